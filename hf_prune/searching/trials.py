"""The trials of a search, stored by Optuna: claimed by one process each, and claimed again where it was killed."""

from __future__ import annotations

import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from ..errors import PruningError
from .aims import Aim, Tried

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_HEARTBEAT, _SILENT = 60, 300  # seconds: a process on another machine that is silent for so long is dead
_JUST_BEGUN = timedelta(seconds=60)
Judge = Callable[[FrozenTrial], bool]
Values = tuple[Sequence[float], Mapping[str, Any]]


class Trials:
    """All trials of one search, also those of other processes.

    Args:
        folder: Of the search; processes that share it see at once who was killed.
        storage: URL of a database, such as ``"sqlite:///search.db"``.
        name: Of the study.
        aim: What changes from trial to trial.
        directions: ``"minimize"`` or ``"maximize"`` for each value of a trial.
        judge: Whether a trial's model is good enough.

    Raises:
        PruningError: The storage cannot be opened.
    """

    def __init__(
        self, folder: Path, storage: str, name: str, aim: Aim, directions: Sequence[Any], judge: Judge
    ) -> None:
        self.folder, self.aim, self.judge = folder, aim, judge
        self._claim = FileLock(folder / "locks" / "claim.lock")
        self.parameter = f"target.{aim.key}"
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats, since 2021
                opened = optuna.storages.RDBStorage(storage, heartbeat_interval=_HEARTBEAT, grace_period=_SILENT)
            self.study = optuna.create_study(
                storage=opened, study_name=name, directions=list(directions), load_if_exists=True, sampler=_Next(self)
            )
        except Exception as error:  # each database raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise PruningError(
                f"storage must be the URL of a database, such as sqlite:///search.db: {reason} Received: '{storage}'"
            ) from error

    # what is there
    @property
    def ended(self) -> list[FrozenTrial]:
        """Trials whose models are there, or could not be made."""
        return self.study.get_trials(deepcopy=False, states=_ENDED)

    @property
    def complete(self) -> list[FrozenTrial]:
        """Trials whose models are there."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    @property
    def running(self) -> list[FrozenTrial]:
        """Trials that a process is at, here or elsewhere."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def asked(self, trial: FrozenTrial) -> float:
        """Return the value of the target's key that a trial asked for."""
        return float(trial.params[self.parameter])

    def tried(self, but: int | None = None) -> list[Tried]:
        """Return what was and is tried, without one trial."""
        known = [one for one in (*self.ended, *self.running) if one.number != but and self.parameter in one.params]
        return [Tried(self.aim.size(self.asked(one)), self._verdict(one)) for one in known]

    def _verdict(self, trial: FrozenTrial) -> bool | None:
        if trial.state == TrialState.RUNNING:
            return None
        return trial.state == TrialState.COMPLETE and self.judge(trial)

    def front(self) -> set[int]:
        """Return the numbers of the trials that no other beats in all values."""
        return {trial.number for trial in self.study.best_trials}

    def remember(self, key: str, value: Any) -> Any:
        """Store something with the study, once; return what is stored."""
        with self._one_at_a_time():
            if key not in self.study.user_attrs:
                self.study.set_user_attr(key, value)
            return self.study.user_attrs[key]

    # one trial
    def run(self, make: Callable[[int, float], Values]) -> None:
        """Claim the next trial, make its model, and store what it is.

        Args:
            make: From a trial's number and the value of the key to values and facts; a `PruningError` means that there
                is no such model.
        """
        held: list[Any] = []

        def objective(trial: optuna.Trial) -> Sequence[float]:
            held.append(FileLock(self._lock(trial.number)))
            held[-1].acquire()
            trial.set_user_attr("host", socket.gethostname())
            value = trial.suggest_float(self.parameter, *self.aim.range)
            self._claim.release()
            try:
                values, facts = make(trial.number, value)
            except PruningError as error:
                trial.set_user_attr("error", str(error))
                raise optuna.TrialPruned(str(error)) from error
            for name, fact in facts.items():
                trial.set_user_attr(name, fact)
            return values

        self._claim.acquire()
        try:
            with _quietly():
                self.study.optimize(objective, n_trials=1)
        finally:  # not before its end is stored: whoever finds the lock free takes the trial for killed
            for lock in (self._claim, *held):
                lock.release(force=True)

    def release_killed(self) -> list[int]:
        """Give trials back whose process was killed; return their numbers."""
        with self._claim:  # while nobody is about to lock a trial of his own
            killed = [one.number for one in self.running if self._is_killed(one)]
            for number in killed:
                self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
                shutil.rmtree(self.place(number), ignore_errors=True)
        return killed

    def _is_killed(self, trial: FrozenTrial) -> bool:
        lock = self._lock(trial.number)
        if not lock.is_file():
            begun = trial.datetime_start or datetime.now()
            return "host" not in trial.user_attrs and datetime.now() - begun > _JUST_BEGUN
        if trial.user_attrs.get("host", socket.gethostname()) != socket.gethostname():
            return False  # locks of other machines are not always seen: its heart has stopped, then
        try:
            with FileLock(lock, timeout=0):
                return True
        except Timeout:
            return False

    def place(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / "trials" / f"{number:03d}"

    def _lock(self, number: int) -> Path:
        return self.folder / "locks" / f"{number:03d}.lock"

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        with FileLock(self.folder / "locks" / "study.lock"):
            yield


class _Next(BaseSampler):
    """Optuna asks here which value is tried next."""

    def __init__(self, trials: Trials) -> None:
        self._trials = trials

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def relative_parameters(self, *_: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> float:
        value = self._trials.aim.next(self._trials.tried(but=trial.number))
        return self._trials.aim.first if value is None else value


@contextmanager
def _quietly() -> Iterator[None]:
    """Let Optuna say what is wrong, and not each trial: the search tells that itself."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
