"""The folder of a report: written beside its place, moved there when it is finished, never over a stranger's files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .results import PROGRAM


class FolderError(ValueError):
    """A folder that cannot take a report; the message is one line that says why and what is allowed."""


class ReportFolder:
    """A temporary folder beside ``out``, which takes the place of ``out`` when it is finished.

    Args:
        out: where the report shall be. It does not exist yet, or is empty, or holds an earlier report and nothing else.

    Raises:
        FolderError: ``out`` holds other files, is no folder, or cannot be written.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).resolve()
        check_replaceable(self.out)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(tempfile.mkdtemp(prefix=f".{self.out.name}-", dir=self.out.parent))
            self.path.chmod(0o777 & ~_umask())  # mkdtemp's 0700 would hide the report from a web server
        except OSError as error:
            raise FolderError(f"{out}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> ReportFolder:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self.out.exists():
            shutil.rmtree(self._old, ignore_errors=True)

    @property
    def _old(self) -> Path:
        """Where the earlier report is while the new one takes its place."""
        return self.path.with_name(f"{self.path.name}-old")

    def finish(self, *, complete: bool) -> Path:
        """Moves the report to its place: ``out``, or ``out-partial`` where ``out`` is complete and this one is not.

        Args:
            complete: whether the study was.

        Returns:
            Where the report is now.

        Raises:
            FolderError: files that are no report's have come into that place meanwhile.
            OSError: it cannot be moved.
        """
        place = self.out
        if not complete and _report(place).get("complete"):
            place = place.with_name(f"{place.name}-partial")
        check_replaceable(place)
        old = self._old
        if place.exists():
            place.rename(old)
        try:
            self.path.rename(place)
        except BaseException:
            if old.exists():
                old.rename(place)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return place


def check_replaceable(folder: Path) -> None:
    """Raises FolderError unless ``folder`` is not there, empty, or holds an earlier report's files and no others."""
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise FolderError(f"{folder}: is the current folder or holds it; name a new folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FolderError(f"{folder}: is a file; name a new folder, an empty one or an earlier report's")
    report = _report(folder)
    known = {"results.json", *report["files"]} if report else set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            raise FolderError(
                f"{folder}: holds files that are not a report's ({name}); name a new folder, an empty one or an "
                "earlier report's"
            )


def _report(folder: Path) -> dict[str, Any]:
    """results.json of an earlier report; empty if there is none."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ours = (
        isinstance(results, dict)
        and results.get("program") == PROGRAM
        and isinstance(results.get("files"), list)
    )
    return results if ours else {}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
