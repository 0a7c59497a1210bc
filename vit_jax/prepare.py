"""Raw data to files that training reads at full speed: python -m vit_jax.prepare --from=PATH
--out=DIR"""

import collections
import concurrent.futures
import contextlib
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from vit_jax import cli
from vit_jax.data.pipeline import available_cores
from vit_jax.data.preparing.forms import open_input
from vit_jax.data.preparing.inputs import Input
from vit_jax.data.preparing.shards import Options, OutputFile, Preparation, Tally
from vit_jax.errors import UserError
from vit_jax.training.metrics import format_seconds

_QUALITY = 95
_SHOWN = 10  # of what is left out; the rest of the files is in bad_files.txt
_SECONDS_BETWEEN_LINES = 10
_BAR = 20  # characters


def main(arguments: list[str]) -> None:
    """Runs the command; see `--help`."""
    parser = cli.ArgumentParser(
        prog="python -m vit_jax.prepare",
        description="Writes images and labels as a TFDS data set in ArrayRecord format, which "
        "config.data.source=tfds:NAME reads. Every image is decoded once; those that cannot be are "
        "left out and reported. Run the same command again to continue after an interruption.",
        epilog="PATH is one of\n"
        "  a folder of images as folder:PATH reads it (without train/ and val/, a tenth of every\n"
        "    class becomes the split validation)\n"
        "  a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and\n"
        "    ILSVRC2012_devkit_t12.tar.gz\n"
        "  a folder with one CLASS.tar of images per class, or a tar file of them (ImageNet-21k)\n"
        "  a TFDS data set in TFRecord format, .../NAME/VERSION; TensorFlow is not needed",
    )
    parser.add_argument("--from", dest="source", metavar="PATH", required=True,
                        help="the raw data")
    parser.add_argument("--out", metavar="DIR", required=True,
                        help="folder of data sets; this one is written to DIR/NAME/1.0.0")
    parser.add_argument("--name", help="name of the data set; default: that of the input")
    parser.add_argument("--resize", metavar="PIXELS", type=int,
                        help="shrink images whose short side is longer, and store JPEGs")
    parser.add_argument("--quality", metavar="Q", type=int,
                        help=f"of the JPEGs that --resize writes, 1 to 100 ({_QUALITY})")
    parser.add_argument("--workers", metavar="N", type=int, default=available_cores(),
                        help="threads; default: the cores this process may use")
    parser.add_argument("--shard", metavar="I/N", default="0/1",
                        help="write the I-th of N parts, I from 0; whichever of the N commands "
                        "finishes last completes the data set")
    parser.add_argument("--records_per_file", metavar="R", type=int,
                        help="default: 128 to 4096, or what makes 512 files of a split")
    flags = parser.parse(arguments)
    for name in ("resize", "workers", "records_per_file"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name}={getattr(flags, name)} must be at least 1.")
    if flags.quality is not None and not 1 <= flags.quality <= 100:
        raise UserError(f"--quality={flags.quality} must be from 1 to 100.")
    if flags.quality is not None and flags.resize is None:
        raise UserError("--quality is that of the JPEGs that --resize writes; give --resize too, "
                        "or leave it out.")
    quality = _QUALITY if flags.quality is None else flags.quality
    part, parts = cli.parse_shard(flags.shard)

    print(f"Listing {flags.source} ...", flush=True)
    source = open_input(flags.source)
    preparation = Preparation(
        source, Path(os.path.abspath(os.path.expanduser(flags.out))),
        data_set_name(source, flags.name),
        Options(flags.resize, quality, flags.records_per_file))
    _check_apart(source, preparation.folder)
    if source.left_out:
        print(f"Ignored, since they are not folders of classes: {_enumerate(source.left_out)}.")
    print(f"Found {', '.join(f'{n:,} images for {name!r}' for name, n in source.splits.items())} "
          f"in {len(source.class_names):,} classes; {len(preparation.files):,} files go to "
          f"{preparation.folder}.", flush=True)
    preparation.claim()
    _write(preparation, preparation.files[part::parts], flags.workers)

    tallies = {file: preparation.done(file) for file in preparation.files}
    missing = sum(tally is None for tally in tallies.values())
    if missing:
        print(f"This part is complete. {missing:,} of {len(tallies):,} files are still missing: "
              "run the other parts, or the command without --shard.")
        return
    preparation.finish(tallies)
    print(report(preparation, tallies))


def data_set_name(source: Input, name: str | None) -> str:
    """NAME or NAME/CONFIG, from `--name` or the input.

    Raises:
      UserError: TFDS does not allow the name, or none can be made of the input's.
    """
    if name is None:
        first, *config = source.data_set.split("/")
        first = re.sub(r"\W+", "_", first, flags=re.ASCII).strip("_").lower()
        if not re.match(r"[a-z]", first):
            raise UserError(f"No name for the data set can be derived from {source.where}; choose "
                            "one with --name=NAME.")
        return "/".join([first, *config])
    if not re.fullmatch(r"[a-zA-Z]\w*", name, flags=re.ASCII):
        raise UserError(f"--name={name!r} must begin with a letter and contain only letters, "
                        "digits and underscores.")
    return name


def _enumerate(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more])


def _check_apart(source: Input, folder: Path) -> None:
    """Refuses to write where the input is read."""
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source.where)):
        raise UserError(f"{folder}, where the data set would go, is inside --from={source.where}; "
                        "choose another --out or --name.")


def _write(preparation: Preparation, files: list[OutputFile], workers: int) -> None:
    """Writes those of `files` that are not complete."""
    pending = [file for file in files if preparation.done(file) is None]
    if not pending:
        return
    if len(pending) < len(files):
        print(f"{len(files) - len(pending):,} of {len(files):,} files are complete already.")
    progress = Progress(sum(file.stop - file.start for file in pending))
    stop = threading.Event()
    # Threads: decoding, shrinking and writing release the interpreter. What is left to it is
    # 0.03 ms of about 1 ms an image (0.2 of 4 with --resize), enough for some 20 cores.
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="prepare")
    with _signals_raise(), progress:
        try:
            running = {pool.submit(preparation.write, file, stop, progress.advance)
                       for file in pending}
            while running:
                ended, running = concurrent.futures.wait(
                    running, timeout=0.5, return_when=concurrent.futures.FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                progress.show()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


class _Stopped(cli.Stopped):
    def __init__(self, number):
        super().__init__(number, 0)
        self.args = (f"Stopped by {number.name}; complete files are kept. Run the same command to "
                     "continue.",)


@contextlib.contextmanager
def _signals_raise():
    """Inside, the first SIGTERM or SIGINT ends the main thread's work as an exception."""
    def stop(number, frame):
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        raise _Stopped(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """Images, images/s and the time left: rewritten in place on a terminal, else a line now and
    then."""

    def __init__(self, images: int):
        self._images = images
        self._done = 0
        self._lock = threading.Lock()
        self._terminal = sys.stdout.isatty()
        self._start = self._last_line = time.monotonic()
        self._ended = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._terminal:
            print(flush=True)

    def advance(self) -> None:
        """Counts an image; from any thread."""
        with self._lock:
            self._done += 1

    def show(self) -> None:
        """Prints, if it is time to."""
        now = time.monotonic()
        finished = self._done == self._images
        waited = self._terminal or now >= self._last_line + _SECONDS_BETWEEN_LINES
        if self._ended or not (waited or finished):
            return
        self._last_line, self._ended = now, finished
        rate = self._done / (now - self._start)
        line = f"{self._done:,}/{self._images:,} images  {rate:,.0f} images/s"
        if rate and not finished:
            line += f"  {format_seconds((self._images - self._done) / rate)} left"
        if self._terminal:
            bar = "#" * (_BAR * self._done // self._images)
            print(f"\r\033[K[{bar:<{_BAR}}] {line}", end="", flush=True)
        else:
            print(line, flush=True)


def report(preparation: Preparation, tallies: dict[OutputFile, Tally]) -> str:
    """What was written, what was left out, and how to train on it."""
    source = preparation.source
    lines = [f"The data set is complete: {preparation.folder}"]
    total = Tally()
    for split in source.splits:
        part = Tally()
        files = [file for file in preparation.files if file.split == split]
        for file in files:
            part.add(tallies[file])
        total.add(part)
        lines.append(f"{split:<11} {part.images:,} images in {len(files):,} files, "
                     f"{_size(part.bytes_in)} of images in, {_size(part.file_bytes)} out")
        counts = collections.Counter(
            {label: part.labels[label] for label in range(len(source.class_names))})
        (most, largest), (fewest, smallest) = counts.most_common()[0], counts.most_common()[-1]
        lines.append(f"{'':<11} {len(source.class_names):,} classes, from {smallest:,} images "
                     f"({source.class_names[fewest]}) to {largest:,} ({source.class_names[most]})"
                     if largest else f"{'':<11} without labels")
    if total.bad:
        lines.append(f"Left out    {len(total.bad):,} unusable image files; all are listed in "
                     f"{preparation.folder / 'bad_files.txt'}:")
        lines += [f"  {where}: {why}" for where, why in total.bad[:_SHOWN]]
        if len(total.bad) > _SHOWN:
            lines.append("  ...")

    train, evaluation = _training_splits(list(source.splits))
    lines += ["Train on it with a recipe of configs/:", "  " + shlex.join([
        "python", "-m", "vit_jax.main", "--config=RECIPE.py", "--workdir=DIR",
        f"--config.data.source=tfds:{preparation.data_set}", f"--config.data.dir={preparation.out}",
        f"--config.data.train_split={train}", f"--config.data.eval_split={evaluation}"])]
    return "\n".join(lines)


def _training_splits(splits):
    train = "train" if "train" in splits else splits[0]
    for evaluation in ("validation", "test"):
        if evaluation in splits and evaluation != train:
            return train, evaluation
    return f"{train}[:98%]", f"{train}[98%:]"


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


if __name__ == "__main__":
    cli.run_command(main)
