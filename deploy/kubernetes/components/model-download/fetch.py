"""Fetch the tar file at MODEL_URL into the directory that is named, if its SHA-256 is MODEL_SHA256.

Nothing of another file is ever at that name. A directory that this has finished is left alone; a
file that broke off is fetched anew. Pods that start together wait for the one that fetches.
"""

import fcntl
import hashlib
import os
import shutil
import sys
import tarfile
import urllib.request
from pathlib import Path

DONE = ".sha256"


def fetch(url: str, wanted: str, target: Path) -> None:
    """Make `target`; SystemExit says in one line what is wrong."""
    done = target / DONE
    if done.is_file() and done.read_text() == wanted:
        print(f"{target}: is there already")
        return
    unpacked, archive = (target.with_name(f".{target.name}.{end}") for end in ("new", "tar"))
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=60) as answer, archive.open("wb") as file:
        while piece := answer.read(2**22):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != wanted:
        archive.unlink()
        sys.exit(f"{url}: SHA-256 is {digest.hexdigest()}, expected {wanted}; nothing is kept")
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    (unpacked / DONE).write_text(wanted)
    archive.unlink()
    shutil.rmtree(target, ignore_errors=True)
    unpacked.rename(target)
    print(f"{target}: fetched")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch(os.environ["MODEL_URL"], os.environ["MODEL_SHA256"].lower(), place)
