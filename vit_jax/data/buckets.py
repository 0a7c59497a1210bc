"""Object stores (gs://, s3://): data are read through the file system, so buckets are mounted."""

import re

from vit_jax.errors import UserError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]+:/")  # of "gs://", which pathlib makes "gs:/"
_MOUNTS = {"gs": "gcsfuse", "gcs": "gcsfuse", "s3": "mountpoint-s3"}


def refuse_bucket(what: str, path: str) -> None:
    """Raises UserError for a path that is a URL.

    Args:
      what: to call it in the message: "config.data.dir".
      path: as the user gave it.
    """
    if _URL.match(path):
        tool = _MOUNTS.get(path.partition(":")[0].lower())
        mount = f"mount it with {tool}" if tool else "mount it"
        raise UserError(
            f"{what}={path} is in an object store, and data are read from the file system alone; "
            f"copy them to a disk, or {mount}, and give that path (docs/data.md).")
