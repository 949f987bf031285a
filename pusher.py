"""Checkpoints to the Hugging Face Hub, in the background: training never waits for it.

A push is one commit that names its parent: all files of a checkpoint at the repository's root and LATEST.json, which
says whose they are; `hub.py` reads it. A commit whose answer was lost is found again at the head; one by somebody else
ends the pushing. What fails is tried again, for hours, and always with the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import card
import checkpoint
import hub
import remote
from checkpoint import FILE_NAME, MANIFEST, CheckpointError
from config import UserError
from hub import LATEST, Latest, told
from options import shown
from text import clean
from tracker import RECORDS

LONGEST_WAIT_SEC = 300.0  # between tries
REFUSED_WAIT_SEC = 3600.0  # the same after an answer that no waiting mends, such as a token that may not write
HURRIED_WAIT_SEC = 5.0  # the same while `flush` waits
ASK_STOPPED_SEC = 0.5
CLOSE_SEC = 5.0

PRIVATE = re.compile(r"step_\d{8}\.hub-[0-9a-f]{8}")  # a folder of hard links, held while it is pushed
OURS = re.compile(r"(step \d+ of|history squashed at step \d+ of) .*|initial commit|Super-squash branch .*")


class Foreign(UserError):
    """Somebody else pushes to the repository, or it is no place for this run."""


class Pusher:
    """Pushes checkpoints to one repository, from one thread, the newest offered first.

    The constructor raises UserError for what no waiting mends: a bad name or token, a repository that is public or of
    another run. A Hub that does not answer is none of these: it is asked again.

    Args:
        run_id: whose checkpoints these are; only a repository that is empty or of this run is written to.
        every_sec: least time between two pushes.
        note: told what a user should know, once.
        public: whether others may see the repository; one that is public already is refused without it.
        keep: states that may gather before the history is squashed into the newest.
        force: take over a repository that holds something else.
        card: gives the model card, its picture and the run's records for a checkpoint's folder.
    """

    def __init__(
        self, repo_id: str, *, run_id: str, every_sec: float, note: Callable[[str], None], public: bool = False,
        keep: int = 2, force: bool = False, card: Callable[[Path], Mapping[str, bytes]] | None = None,
        clock: Callable[[], float] = time.monotonic, start: bool = True,
    ):  # fmt: skip
        self.repo_id, self.run_id, self.every_sec, self.note = repo_id, run_id, every_sec, note
        self.public, self.keep, self.force, self.card, self.clock = public, keep, force, card, clock
        self.writer = secrets.token_hex(8)
        self.pushed_step: int | None = None
        self._known = {self.writer}  # writers whose state ours may replace
        self._adopted = self._closed = self._woken = self._hurry = self._gave_up = self._history_told = False
        self._refused = False  # at the last failure
        self._stopped = self._failing = self._card_failed = ""
        self._offers: list[tuple[Path, float]] = []  # not on the Hub yet, and when they were offered
        self._item: Path | None = None  # the private folder that is pushed
        self._item_manifest: dict[str, Any] = {}
        self._item_sha256 = ""
        self._next = self._not_before = self._asked_until = clock()
        self._tries = 0
        self._changed = threading.Condition()
        self.api = hub.connect(repo_id)
        if self.api.token is None:
            raise UserError(
                f"hub.repo_id = {repo_id!r} needs a token with write access: set HF_TOKEN in the environment or in .env"
            )
        try:
            self._head()
        except (UserError, hub.Gone, *hub.failures()) as error:
            problem = hub.explained(error, repo_id, self.api)
            if not isinstance(problem, remote.Unreachable):
                raise problem from None
            self._fail(error)
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True) if start else None
        if self._thread is not None:
            self._thread.start()

    def offer(self, path: Path) -> None:
        """Push this checkpoint, a verified folder that nothing changes, unless a newer one comes first. Never waits.

        It has to stay until a newer one is offered; from when its turn comes on, links keep its files.
        """
        with self._changed:
            self._offers.append((path, self.clock()))
            self._wake()

    def metrics(self) -> dict[str, Any]:
        """How far the Hub is behind, in steps and seconds; the last failure, None when all is well."""
        with self._changed:
            offers = self._offers
            newest = checkpoint.step_of(offers[-1][0]) if offers else None
            return {
                "hub_pushed_step": self.pushed_step,
                "hub_lag_steps": 0 if newest is None else max(0, newest - (self.pushed_step or 0)),
                "hub_lag_sec": round(self.clock() - offers[0][1], 1) if offers else 0.0,
                "hub_error": self._stopped or self._failing or None,
            }

    def flush(self, timeout_sec: float, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Push what is waiting now; whether the newest checkpoint offered is on the Hub.

        Waits for at most so long, and not once `stopped` (a signal came) or where no waiting mends it.
        """
        end = time.monotonic() + timeout_sec
        with self._changed:
            self._hurry, self._gave_up, self._not_before = True, False, self._asked_until
            self._wake()
            while self._offers and not (self._stopped or self._gave_up or stopped()):
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(min(left, ASK_STOPPED_SEC))
            self._hurry = False
            return not self._offers

    def close(self) -> None:
        """Stop; a push under way is left to itself, and either comes whole or not at all."""
        with self._changed:
            self._closed = True
            self._wake()
        if self._thread is not None:
            self._thread.join(CLOSE_SEC)
        if self._thread is None or not self._thread.is_alive():
            self._drop()

    # --- the thread ---

    def _wake(self) -> None:
        self._woken = True
        self._changed.notify_all()

    def _work(self) -> None:
        while not self._closed:
            try:
                delay = self._turn()
            except Exception as error:  # noqa: BLE001  # nobody hears a thread die; what it says is in the metrics
                self._failing, delay = told(error), LONGEST_WAIT_SEC
            with self._changed:
                self._changed.wait_for(lambda: self._woken, delay)
                self._woken = False

    def _turn(self) -> float | None:
        """Push if it is time to; the seconds until it is, None: not before another offer."""
        with self._changed:
            now = self.clock()
            wait = max(self._not_before, 0 if self._hurry else self._next) - now
            if self._stopped or self._closed or not self._offers:
                return None
            if wait > 0:
                return wait
            number, path = len(self._offers), self._offers[-1][0]
        try:
            self._take(path)
            self._push()
            self._done(number, now)
        except Foreign as error:
            self._stop(str(error))
        except CheckpointError as error:  # no longer whole on this disk, or gone: the next one
            self.note(f"hub: {told(error)}; not pushed")
            self._drop()
            with self._changed:
                del self._offers[number - 1]
        except Exception as error:  # noqa: BLE001  # the network, the Hub, a full disk: training goes on
            return self._fail(error)
        return 0.0

    def _take(self, path: Path) -> None:
        """Links (copies where there can be none) to the checkpoint's files: retention may delete it meanwhile."""
        if self._item is not None and self._item.name[:13] == path.name:
            with contextlib.suppress(FileNotFoundError):
                if hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest() != self._item_sha256:
                    self._drop()  # the run went back and came to this step by another way
        if self._item is not None and self._item.name[:13] == path.name:
            return
        self._drop()
        folder = path.with_name(f"{path.name}.hub-{secrets.token_hex(4)}")
        try:
            for left in path.parent.iterdir():  # of processes that were killed
                if PRIVATE.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)
            folder.mkdir()
            self._item = folder
            for name in sorted(entry.name for entry in path.iterdir()):
                try:
                    os.link(path / name, folder / name)
                except FileNotFoundError:
                    raise
                except OSError:
                    shutil.copyfile(path / name, folder / name)
            self._item_manifest = checkpoint.verify(folder)
            self._item_sha256 = checkpoint.key_of(folder)[1]
        except FileNotFoundError:
            raise CheckpointError(f"{path}: gone before its turn") from None
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._item is not None:
            shutil.rmtree(self._item, ignore_errors=True)
            self._item = None

    def _push(self) -> None:
        """Make the head hold the item, unless it does: one commit, or none."""
        head, latest = self._head()
        if latest is not None and self._is_item(latest) and (latest.writer == self.writer or self._same_records(head)):
            return
        try:
            self._commit(head)
        except Exception as error:
            try:
                now, latest = self._head()
            except Foreign:
                raise
            except Exception:  # noqa: BLE001  # the next try asks again
                raise error from None
            if self._is_item(latest):
                return
            if now == head and getattr(remote.response_of(error), "status_code", 0) == 412:  # datasets #7777
                raise UserError(
                    f"hub.repo_id = {self.repo_id!r}: the Hub says that somebody else has pushed (412), and nobody "
                    "has; the token has to be one that may write, not only open pull requests"
                ) from None
            raise
        else:
            if not self._is_item(self._head()[1]):
                raise remote.Unreachable("the Hub took the commit and does not show it")

    def _same_records(self, head: str | None) -> bool:
        """Not where an evaluation that was cut short was made up for since a process before this one has pushed."""
        ours = {name: content for name, content in self._card(head).items() if name in RECORDS}
        most = hub.MOST_RECORD_BYTES
        return all(hub.read(self.api, self.repo_id, str(head), name, most) == ours[name] for name in ours)

    def _commit(self, head: str | None) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        assert self._item is not None
        step = self._item_manifest["step"]
        contents: dict[str, bytes | str] = {name: str(self._item / name) for name in self._item_manifest["files"]}
        contents[MANIFEST] = str(self._item / MANIFEST)
        fields = {"run": self.run_id, "writer": self.writer, "step": step, "manifest_sha256": self._item_sha256}
        contents[LATEST] = (json.dumps({"schema": hub.SCHEMA, **fields}, indent=2) + "\n").encode()
        extra = self._card(head)
        stale = [name for name in self._listed(head) if name not in contents and ".safetensors" in name]
        message = f"step {step} of {self.run_id}"
        for attempt in (extra, {}):
            operations: list[Any] = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]
            operations += [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                for name, content in sorted({**attempt, **contents}.items())
            ]
            try:
                self.api.create_commit(self.repo_id, operations, commit_message=message, parent_commit=head)
                return
            except ValueError as error:  # before anything was sent; the client lets the Hub check the card first
                if not attempt or "README.md" not in str(error):
                    raise
                self._without_card(error)

    def _card(self, head: str | None) -> dict[str, bytes]:
        """The model card's files and the run's records; a card that cannot be written is not worth a checkpoint. One
        that somebody else has written stays."""
        assert self._item is not None
        if self.card is None or self._card_failed:
            return {}
        try:
            there = hub.read(self.api, self.repo_id, head, "README.md") if head else None
        except CheckpointError:  # too large to be ours
            there = b""
        try:
            files = dict(self.card(self._item))
        except Exception as error:  # noqa: BLE001
            self._without_card(error)
            return {}
        theirs = there is not None and card.MARK.encode() not in there
        taken = {*self._item_manifest["files"], *(("README.md", card.PICTURE) if theirs else ())}
        return {name: content for name, content in files.items() if name not in taken}

    def _without_card(self, error: BaseException) -> None:
        self._card_failed = told(error)
        self.note(f"hub: no model card: {self._card_failed}; checkpoints are pushed without it")

    def _listed(self, commit: str | None) -> list[str]:
        """The files at the repository's root."""
        if commit is None:
            return []
        tree = self.api.list_repo_tree(self.repo_id, revision=commit)
        return [entry.path for entry in itertools.islice(tree, hub.MOST_FILES) if FILE_NAME.fullmatch(entry.path)]

    def _head(self) -> tuple[str | None, Latest | None]:
        """The commit at the head and what it holds; the repository is made where there is none.

        Raises Foreign unless it is a place for this run, and no other process has pushed since we looked first.
        """
        from huggingface_hub import errors

        def look() -> Any:
            return self.api.repo_info(self.repo_id, timeout=hub.ASK_SEC)

        try:
            info = look()
        except errors.RepositoryNotFoundError as error:
            if error.response.status_code != 404:  # 401: the token is none
                raise
            self.api.create_repo(self.repo_id, private=not self.public, exist_ok=True)
            info = look()
        where = f"hub.repo_id = {self.repo_id!r}"
        if not info.private and not self.public:
            raise Foreign(f"{where} is public; hub.public=true pushes there all the same, or give a private one")
        try:
            latest = hub.latest_at(self.api, self.repo_id, info.sha) if info.sha else None
        except CheckpointError as error:
            if not self.force or self._adopted:
                raise Foreign(f"{where}: {error}; give another hub.repo_id") from None
            latest = None
        if latest is None and not self._adopted and not self.force:
            known = {".gitattributes", "README.md", "LICENSE"}
            others = sorted(entry.rfilename for entry in info.siblings or () if entry.rfilename not in known)
            if others:
                raise Foreign(f"{where} holds other files, such as {shown(others[0])}; give an empty or new one")
        ours = latest is None or (latest.writer in self._known if self._adopted else self.force)
        if latest is not None and latest.run != self.run_id and not ours:
            raise Foreign(
                f"{where} holds another run, {shown(latest.run)} at step {latest.step}; give another hub.repo_id"
            )
        if latest is not None and self._adopted and not ours:
            raise Foreign(
                f"{where}: another process (writer {shown(latest.writer)}) pushes this run, at step {latest.step} "
                "now; it goes on, this one pushes no more"
            )
        if not self._adopted:
            self._adopted = True
            if latest is not None:
                self._known.add(latest.writer)
                self.pushed_step = latest.step if latest.run == self.run_id else None
        return info.sha, latest

    def _is_item(self, latest: Latest | None) -> bool:
        item = (self._item_manifest["step"], self.run_id, self._item_sha256)
        return latest is not None and latest[:3] == item

    def _done(self, number: int, started: float) -> None:
        step = int(self._item_manifest["step"])
        first = self.pushed_step is None
        was_failing, self._failing, self._tries = self._failing, "", 0
        self._drop()
        if first or was_failing:
            self.note(f"hub: step {step} is at {self.api.endpoint}/{self.repo_id}")
        self._squash(step)
        with self._changed:
            self.pushed_step = step
            self._next = started + self.every_sec
            del self._offers[:number]
            self._changed.notify_all()

    def _squash(self, step: int) -> None:
        """Free what older states take, once more than `keep` are there; the head was just read and is ours.

        A history that holds a commit of anybody else is left alone. A failure is told and waits for the next push.
        """
        try:
            commits = self.api.list_repo_commits(self.repo_id)
            others = [commit.title for commit in commits if not OURS.fullmatch(commit.title)]
            if sum(" of " in commit.title for commit in commits) <= self.keep:
                return
            if others:
                if not self._history_told:
                    self._history_told = True
                    self.note(f"hub: the history holds a commit of somebody else ({shown(others[0])}): it stays whole")
                return
            if not self._is_item(self._head()[1]):
                return
            message = f"history squashed at step {step} of {self.run_id}"
            self.api.super_squash_history(self.repo_id, commit_message=message)
        except Exception as error:  # noqa: BLE001  # the state is there, that is what counts
            self._failing = f"the history could not be squashed: {told(error)}"

    def _fail(self, error: BaseException) -> float:
        """Remember a failure, tell it if it is news; seconds until the next try."""
        refused = hub.refused(error, self.api)
        asked = remote.asked_wait(remote.response_of(error))
        wait = min(2.0**self._tries, LONGEST_WAIT_SEC) * random.uniform(0.5, 1.0)
        problem = told(hub.explained(error, self.repo_id, self.api)) if remote.response_of(error) else told(error)
        news = self._tries == 0 or (refused and not self._refused)
        with self._changed:
            self._tries = min(self._tries + 1, 16)
            self._failing, self._refused = problem, bool(refused)
            now = self.clock()
            if refused:
                wait = REFUSED_WAIT_SEC
                self._gave_up = True
            elif self._hurry:
                wait = min(wait, HURRIED_WAIT_SEC)
            if asked:
                wait = max(wait, asked + random.uniform(0, 1))
                self._asked_until = now + wait
            self._not_before = now + wait
            self._changed.notify_all()
        if news:
            self.note(f"hub: {problem}; training goes on, and the push is tried again")
        return wait

    def _stop(self, reason: str) -> None:
        self._drop()
        with self._changed:
            self._stopped = clean(reason)
            self._changed.notify_all()
        self.note(f"hub: {self._stopped}; nothing more is pushed, training goes on")
