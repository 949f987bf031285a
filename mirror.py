"""A run's copy on the Hugging Face Hub: fetched at the start where it is newer, pushed beside training."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import card
import checkpoint
import hub
import resume
import tracker
from config import Config, UserError
from counts import Counts
from foreign import CheckpointError
from pusher import Pusher
from remote import Unreachable

RUN_FILE = "hub.json"  # whose checkpoints a folder and a repository hold: the run's name and random digits
FLUSH_SEC = 1800.0  # at the end of a run
HURRIED_SEC = 15.0  # after a signal: 30 s is what torchrun and spot machines give


class Mirror:
    """Of rank 0; without a repository (`repo_id` None) everything is a no-op. What it verifies is added to `known`."""

    def __init__(self, repo_id: str | None, config: Config, counts: Counts, num_bytes: int, known: checkpoint.Known):
        self.repo_id, self.config, self.folder = repo_id, config, Path(config.run.dir)
        self.counts, self.num_bytes, self.known = counts, num_bytes, known
        self.note: Callable[[str], None] = print
        self.pusher: Pusher | None = None
        self.run_id = ""
        self.ahead: Path | None = None  # the newest checkpoint here, where the repository has none or an older one

    def fetch(self, resume_from: str, precision: str, claim: Callable[[], object]) -> None:
        """Bring the repository's newest checkpoint here, if it is newer than what is here.

        With `--resume PATH` that checkpoint wins, and nothing is brought. Raises UserError where the repository holds
        another run, or cannot be asked and nothing is here to go on from.
        `claim` makes the folder ours before the first file is written.
        """
        if self.repo_id is None or resume_from == "never":  # then the folder will be moved aside
            return
        place, root = self.folder / RUN_FILE, self.folder / "checkpoints"
        if place.exists():
            self.run_id = str(checkpoint.read_json(place).get("run", ""))
        local = checkpoint.latest(root, quarantine=True, known=self.known)
        if resume_from != "auto":
            self._adopt(resume_from, local, precision)
            return
        self.ahead = local
        try:
            theirs = hub.newest(self.repo_id)
            if theirs is None:
                return
            self._check(theirs, local)
            if local is not None and checkpoint.step_of(local) >= theirs.step:
                self.ahead = local if checkpoint.step_of(local) > theirs.step else None
                return
            self._check_config(theirs, precision)
            self.run_id = theirs.run
            claim()
            self.remember()  # first: a folder with checkpoints and no name would be taken for another run's
            self.note(f"hub: fetching step {theirs.step} of {self.repo_id}")
            self._records(theirs, -1 if local is None else checkpoint.step_of(local))  # with the checkpoint here, never
            pulled = hub.pull(self.repo_id, root, note=self.note)
            if pulled is not None:
                self.known.add(checkpoint.key_of(pulled))
            self.ahead = None
        except (Unreachable, CheckpointError) as error:
            if local is None:
                raise UserError(f"{error}; a run may be there to go on with; to start afresh: --resume never") from None
            self.note(f"{error}; going on from {local}")

    def _records(self, theirs: hub.Latest, step: int) -> None:
        """Metrics and samples of the steps after `step`, taken elsewhere; without them a run goes on, too."""
        assert self.repo_id is not None
        for name in tracker.RECORDS:
            try:
                content = hub.read_record(self.repo_id, theirs.commit, name)
                if content is not None:
                    tracker.add_missing(self.folder / name, step, content)
            except (UserError, OSError) as error:
                self.note(f"hub: {name} of before is not here: {hub.told(error)}")

    def _adopt(self, path: str, local: Path | None, precision: str) -> None:
        """Take the repository's run for this one, which goes on from `path`, if by name and configuration it is."""
        assert self.repo_id is not None
        try:
            theirs = hub.newest(self.repo_id)
            if theirs is None:
                return
            self._check(theirs, local)
            self._check_config(theirs, precision)
        except (Unreachable, CheckpointError) as error:
            self.note(f"{error}; going on from {local or path}")
            return
        self.run_id = theirs.run
        if local is None:
            self.note(
                f"hub: {self.repo_id} holds step {theirs.step} of this run; it goes on from {path} all the same, and "
                "what it pushes replaces that"
            )

    def _check(self, theirs: hub.Latest, local: Path | None) -> None:
        name = self.config.run.name
        if theirs.run != (self.run_id or theirs.run) or (local is not None and not self.run_id):
            raise UserError(
                f"hub.repo_id = {self.repo_id!r} holds another run than {self.folder}; give another hub.repo_id=... or "
                "run.name=..."
            )
        there = theirs.run.rpartition("-")[0]
        if there != name:
            raise UserError(
                f"hub.repo_id = {self.repo_id!r} holds the run {there!r}, this one is {name!r}; give another "
                "hub.repo_id=... or that run.name=..."
            )

    def _check_config(self, theirs: hub.Latest, precision: str) -> None:
        """Before gigabytes are fetched: whether the configuration still fits."""
        assert self.repo_id is not None
        state = hub.read(hub.connect(self.repo_id), self.repo_id, theirs.commit, resume.STATE_FILE)
        if state is not None:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, resume.STATE_FILE).write_bytes(state)
                resume.check_config(resume.TrainState.read(Path(folder)), self.config, precision)

    def start(self) -> None:
        """Begin to push; raises UserError for what no waiting mends. Nothing is written yet."""
        if self.repo_id is None:
            return
        self.run_id = self.run_id or f"{self.config.run.name}-{secrets.token_hex(8)}"
        options = self.config.hub
        self.pusher = Pusher(
            self.repo_id, run_id=self.run_id, every_sec=60 * options.every_minutes, note=lambda text: self.note(text),
            public=options.public, keep=options.keep, card=self._card,
        )  # fmt: skip

    def begin(self, note: Callable[[str], None]) -> None:
        """The run's folder is there: what pushing comes to is told, and what is only here is offered."""
        self.note = note
        if self.pusher is not None and self.repo_id is not None:
            self.remember()
            note(hub.plan(self.num_bytes, self.config.hub.model_copy(update={"repo_id": self.repo_id})))
            if self.ahead is not None:
                self.pusher.offer(self.ahead)

    def catch_up(self) -> bool:
        """For a finished run: push what is only here; whether all is there."""
        if self.repo_id is None or self.ahead is None:
            return True
        self.start()
        self.begin(print)
        return self.finish(lambda: False, hurried=False)

    def offer(self, path: Path) -> None:
        if self.pusher is not None:
            self.pusher.offer(path)

    def metrics(self) -> dict[str, Any]:
        return self.pusher.metrics() if self.pusher is not None else {}

    def finish(self, stopped: Callable[[], bool], *, hurried: bool) -> bool:
        """Whether the newest checkpoint is on the Hub, after at most `FLUSH_SEC`, or `HURRIED_SEC` from a signal on."""
        if self.pusher is None:
            return True
        done = not hurried and self.pusher.flush(FLUSH_SEC, stopped)
        if not done and (hurried or stopped()):
            done = self.pusher.flush(HURRIED_SEC)
        if not done:
            error = self.metrics()["hub_error"] or "no answer in time"
            self.note(f"the newest checkpoint is not on the Hub: {error}; the same command tries again")
        return done

    def close(self) -> None:
        if self.pusher is not None:
            self.pusher.close()

    def remember(self) -> None:
        place = self.folder / RUN_FILE
        checkpoint.replace(place, (json.dumps({"run": self.run_id}) + "\n").encode())

    def _card(self, path: Path) -> dict[str, bytes]:
        assert self.repo_id is not None
        total, active = self.counts.total + self.counts.mtp, self.counts.active_with_head
        step = checkpoint.step_of(path)
        records = {name: tracker.recorded(self.folder / name, most=step).encode() for name in tracker.RECORDS}
        made = card.files(self.folder, repo_id=self.repo_id, step=step, total=total, active=active)
        return {name: content for name, content in (records | made).items() if content}
