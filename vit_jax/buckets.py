"""Object stores (gs://, s3://): all files go through the file system, so buckets are mounted."""

import re

from vit_jax.errors import UserError

# Of "gs://", which pathlib makes "gs:/"; "folder:/data" is a data source.
_URL = re.compile(r"(?!folder:)([a-zA-Z][a-zA-Z0-9+\-]+):/+")


def refuse_bucket(what: str, path: str) -> None:
    """Raises UserError for a path that is a URL, which would become a local folder "gs:".

    Args:
      what: to call it in the message: "config.data.dir".
      path: as the user gave it.
    """
    if match := _URL.match(path):
        raise UserError(
            f"{what}={match[1]}://{path[match.end():]} is a URL, but only paths in the file system "
            "are supported; give a path on a disk or, to read data, in a mounted bucket "
            "(gcsfuse, mountpoint-s3; see docs/data.md).")
