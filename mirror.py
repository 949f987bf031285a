"""A run's copy on the Hugging Face Hub: fetched at the start where it is newer, pushed beside training."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import card
import checkpoint
import hub
from config import Config, UserError
from counts import Counts
from pusher import Pusher
from remote import Unreachable

RUN_FILE = "hub.json"  # whose checkpoints a folder and a repository hold
FLUSH_SEC = 1800.0  # at the end of a run
HURRIED_SEC = 15.0  # after a signal: 30 s is what torchrun and spot machines give


class Mirror:
    """Of rank 0; without a repository (`repo_id` None) everything is a no-op."""

    def __init__(self, repo_id: str | None, config: Config):
        self.repo_id, self.config, self.folder = repo_id, config, Path(config.run.dir)
        self.pusher: Pusher | None = None
        self.run_id = ""

    def fetch(self, resume_from: str, note: Callable[[str], None], claim: Callable[[], object]) -> None:
        """Bring the repository's newest checkpoint here, if it is newer than what is here.

        Raises UserError where the repository holds another run, or cannot be asked and nothing is here to go on from.
        `claim` makes the folder ours before the first file is written.
        """
        if self.repo_id is None:
            return
        place = self.folder / RUN_FILE
        self.run_id = str(checkpoint.read_json(place).get("run", "")) if place.exists() else ""
        if resume_from == "never":
            self.run_id = ""  # the folder will be moved aside
        if resume_from != "auto":
            return
        root = self.folder / "checkpoints"
        local = checkpoint.latest(root, quarantine=True)
        try:
            theirs = hub.newest(self.repo_id)
        except Unreachable as error:
            if local is None:
                raise UserError(f"{error}; a run may be there to go on with; to start afresh: --resume never") from None
            note(f"{error}; going on from {local}")
            return
        if theirs is None:
            return
        if theirs.run != (self.run_id or theirs.run) or (local is not None and not self.run_id):
            raise UserError(
                f"hub.repo_id = {self.repo_id!r} holds another run than {self.folder}; give another hub.repo_id=... or "
                "run.name=..."
            )
        self.run_id = theirs.run
        if local is None or int(local.name[5:13]) < theirs.step:
            claim()
            note(f"hub: fetching step {theirs.step} of {self.repo_id}")
            hub.pull(self.repo_id, root, note=note, revision=theirs.commit)
            self._remember()

    def start(self, note: Callable[[str], None], counts: Counts, num_bytes: int) -> None:
        """Begin to push; raises UserError for what no waiting mends."""
        if self.repo_id is None:
            return
        self.run_id = self.run_id or secrets.token_hex(8)
        self._remember()
        note(hub.plan(num_bytes, self.config.hub.model_copy(update={"repo_id": self.repo_id})))
        options = self.config.hub
        self.pusher = Pusher(
            self.repo_id, run_id=self.run_id, every_sec=60 * options.every_minutes, note=note, public=options.public,
            keep=options.keep, card=lambda path: self._card(path, counts),
        )  # fmt: skip

    def offer(self, path: Path) -> None:
        if self.pusher is not None:
            self.pusher.offer(path)

    def metrics(self) -> dict[str, Any]:
        return self.pusher.metrics() if self.pusher is not None else {}

    def finish(self, *, hurried: bool) -> bool:
        """Whether the newest checkpoint is on the Hub, after at most `FLUSH_SEC`, or `HURRIED_SEC`."""
        return self.pusher is None or self.pusher.flush(HURRIED_SEC if hurried else FLUSH_SEC)

    def close(self) -> None:
        if self.pusher is not None:
            self.pusher.close()

    def _card(self, path: Path, counts: Counts) -> dict[str, bytes]:
        assert self.repo_id is not None
        total, active = counts.total + counts.mtp, counts.active_with_head
        step = int(path.name[5:13])
        return card.files(self.folder, repo_id=self.repo_id, step=step, total=total, active=active)

    def _remember(self) -> None:
        (self.folder / RUN_FILE).write_text(json.dumps({"run": self.run_id}) + "\n", encoding="utf-8")
