"""The thread that owns the device: it gives rows to jobs, runs rounds of forward passes, and tells the jobs."""

import collections
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dlm_jax.errors import UserError
from dlm_jax.language_model import LanguageModel
from dlm_jax.sampling.lane import Job, Lane, LaneKey, lane_key

PASSES = 8  # forward passes of a round, between which requests come and go
MAX_LANES = 32  # combinations of settings that are ever compiled, so that no client makes the server compile forever
log = logging.getLogger("dlm_jax.serving")


class QueueFull(Exception):
    """More requests are waiting than the server wants."""


class Place(NamedTuple):
    """What may share a lane."""

    model: str
    key: LaneKey


class Batcher:
    """Serves the jobs of all models, first come first served within a lane.

    A lane exists in up to three sizes, since every pass computes all rows: a job that is alone gets one of few rows.
    examples: (model, job) of the kinds that most clients will ask for, whose programs a second thread compiles. Raises
    `UserError` if they cannot be served.
    """

    def __init__(self, models: dict[str, LanguageModel], rows: int, context: int, max_waiting: int,
                 examples: Sequence[tuple[str, Job]] = ()) -> None:
        self.models, self.context, self.max_waiting = models, context, max_waiting
        self.sizes = sorted({1, min(8, rows), rows})
        self.lanes: dict[tuple[Place, int], Lane] = {}
        self.examples = examples
        self.places = {self._place_of(*example) for example in examples}
        self.waiting: collections.deque[tuple[Place, Job]] = collections.deque()
        self.passes = 0  # forward passes so far
        self.wake, self.stopping = threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self.compiler = threading.Thread(target=self._compile, name="compiler", daemon=True)

    def submit(self, model: str, jobs: Sequence[Job]) -> None:
        """Puts jobs into the queue, all or none.

        Raises `QueueFull`, and `UserError` for what the model cannot serve.
        """
        if len(jobs) > self.max_waiting:
            raise UserError(f"the request has {len(jobs)} sequences and {self.max_waiting} may wait; ask for fewer "
                            "prompts or choices")
        places = [self._place_of(model, job) for job in jobs]
        with self.wake:
            if len(self.waiting) + len(jobs) > self.max_waiting:
                raise QueueFull(f"{len(self.waiting)} requests are waiting already; try again later")
            if len(self.places | set(places)) > MAX_LANES:
                raise UserError(f"this server has compiled {MAX_LANES} combinations of settings and takes no other; "
                                "use unmasking and block as in an earlier request")
            self.places |= set(places)
            self.waiting.extend(zip(places, jobs))
            self.wake.notify()

    @property
    def active(self) -> int:
        """How many jobs have a row."""
        return sum(lane.busy for lane in list(self.lanes.values()))

    def start(self) -> None:
        """Starts the threads."""
        self.thread.start()
        self.compiler.start()

    def stop(self) -> None:
        """Ends the threads, after a round and after what is being compiled: one that is still in XLA when Python ends
        aborts the process. Jobs that are not finished stay so."""
        with self.wake:
            self.stopping = True
            self.wake.notify()
        for thread in (self.thread, self.compiler):
            if thread.is_alive():
                thread.join()

    def _place_of(self, model: str, job: Job) -> Place:
        lm = self.models[model]
        return Place(model, lane_key(job, lm.config, lm.spec, min(self.context, lm.config.max_length)))

    def _run(self) -> None:
        while self._wait():
            self._admit()
            for where, lane in list(self.lanes.items()):
                if jobs := [job for job in lane.jobs if job is not None]:
                    self._guarded(where, jobs, functools.partial(self._advance, lane, jobs))

    def _wait(self) -> bool:
        """Waits for something to do; False if that is to stop."""
        with self.wake:
            self.wake.wait_for(lambda: self.stopping or self.waiting or self.active)
            return not self.stopping

    def _compile(self) -> None:
        """Compiles for the examples, by serving each in a lane of its own that nobody else sees."""
        for size, (model, job) in itertools.product(self.sizes, self.examples):
            for _ in self._warm(self._place_of(model, job), size, job):
                if self.stopping:
                    return

    def _warm(self, place: Place, size: int, job: Job) -> Iterator[None]:
        """Compiles what a lane needs, and stops after each program."""
        yield
        lane = self._new_lane(place, size, job)
        for each in lane.examples(job):
            yield
            lane.admit(each)
            yield
            lane.advance(1)

    def _advance(self, lane: Lane, jobs: list[Job]) -> None:
        self.passes += lane.advance(1 if any(job.every_pass for job in jobs) else PASSES)

    def _admit(self) -> None:
        """Gives rows to waiting jobs; those for which none is free stay in the queue, in order."""
        with self.wake:
            queue, self.waiting = self.waiting, collections.deque()
        queue = collections.deque((place, job) for place, job in queue if not job.cancelled)
        crowd = collections.Counter(place for place, _ in queue)
        for (place, _), lane in self.lanes.items():
            crowd[place] += lane.busy
        left = [(place, job) for place, job in queue if not self._placed(place, job, crowd[place])]
        with self.wake:
            self.waiting.extendleft(reversed(left))

    def _placed(self, place: Place, job: Job, crowd: int) -> bool:
        """Whether the job could leave the queue: into the smallest lane that would hold the whole crowd, or a larger
        one."""
        for size in [size for size in self.sizes if size >= crowd] or self.sizes[-1:]:
            where = place, size
            if where not in self.lanes and not self._guarded(where, [job], functools.partial(self._open, where, job)):
                return True
            if self.lanes[where].free:
                self._guarded(where, [job], functools.partial(self.lanes[where].admit, job))
                return True
        return False

    def _open(self, where: tuple[Place, int], job: Job) -> None:
        self.lanes[where] = self._new_lane(*where, job)

    def _new_lane(self, place: Place, size: int, job: Job) -> Lane:
        lm = self.models[place.model]
        return Lane(lm.params, lm.config, lm.spec, job, place.key.length, size)

    def _guarded(self, where: tuple[Place, int], jobs: list[Job], action: Callable[[], object]) -> bool:
        """Runs `action`; should it fail, its jobs fail and the lane goes, while the server stays."""
        try:
            action()
        except Exception:
            log.exception("a forward pass failed")
            lane = self.lanes.pop(where, None)
            for job in {*jobs, *(job for job in (lane.jobs if lane else []) if job is not None)}:
                job.listener(job, None)
            return False
        return True
