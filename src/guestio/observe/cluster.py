"""Parts of recordings, asked by the workers of a Dask cluster. Needs the extra ``cluster``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any, Final

from guestio.budgets import REPORT_CLUSTER_WAIT
from guestio.observe.parts import Asker, Part, PartAnswer, Portion, Portions
from guestio.observe.places import reason
from guestio.observe.queries import SAME, connected
from guestio.observe.recording import RecordingError

try:
    import distributed
except ImportError as _error:
    raise ImportError(
        f"clusters need the extra 'cluster' (pip install 'guestio[cluster]'): {_error}"
    ) from _error

LOOK_EVERY: Final = 5.0
"""Seconds after which it is looked whether there are workers at all."""

AHEAD: Final = 2
"""Parts for each thread of the workers that they are given before the answers to others are there.
"""


def ask_part(part: Part, memory: int) -> PartAnswer:
    """What is found in a part; runs in a worker.

    Args:
        part: What to ask.
        memory: Bytes for all threads of the worker together.
    """
    share = memory // max(distributed.get_worker().state.nthreads, 1)
    with connected(share, 1) as connection:
        return Asker(connection, share).ask(part)


class Cluster:
    """A cluster that a report is made on.

    Args:
        scheduler: The address of its scheduler, as ``tcp://host:8786``.
        wait: Seconds that may pass without any worker.

    Raises:
        RecordingError: There is no scheduler, or no worker within the time.

    A worker that is lost costs what it was working on: others do that again.
    """

    def __init__(self, scheduler: str, wait: float = REPORT_CLUSTER_WAIT) -> None:
        self._scheduler, self._wait = scheduler, wait
        try:
            self._client = distributed.Client(
                scheduler, timeout=max(min(wait, 10), 1), set_as_default=False
            )
        except (OSError, ValueError, TimeoutError) as error:
            raise RecordingError(f"no Dask scheduler at {scheduler}: {reason(error)}") from None
        try:
            self.threads = self._threads()
        except BaseException:
            self.close()
            raise

    def _threads(self) -> dict[str, int]:
        """The workers' threads, by their addresses; waits for one."""
        end = time.monotonic() + self._wait
        while True:
            try:
                found: dict[str, int] = dict(self._client.nthreads())
            except (OSError, TimeoutError) as error:
                raise self._lost(error) from None
            if found:
                return found
            if time.monotonic() >= end:
                raise RecordingError(
                    f"the cluster of {self._scheduler} has no workers: start `dask worker "
                    f"{self._scheduler}` where guestio[record,cluster] is installed"
                )
            time.sleep(min(0.2, self._wait))

    def _lost(self, error: BaseException) -> RecordingError:
        return RecordingError(f"the scheduler at {self._scheduler} is lost: {reason(error)}")

    def ask(self, parts: Iterable[Part], memory: int) -> Portions:
        """Parts and what was found in them, in any order.

        Args:
            parts: What to ask.
            memory: Bytes for each worker.

        Raises:
            RecordingError: The cluster is lost, or workers lack memory or guestio, or have another
                version of it.
        """
        waiting = iter(parts)
        running: dict[Any, Part] = {}
        ahead = AHEAD * sum(self.threads.values())
        try:
            while True:
                for part in itertools.islice(waiting, max(ahead - len(running), 0)):
                    # Each time anew: files may have changed since another report.
                    future = self._client.submit(ask_part, part, memory, pure=False)
                    running[future] = part
                if not running:
                    return
                try:
                    with self._client.as_current():
                        done = distributed.wait(
                            list(running), timeout=LOOK_EVERY, return_when="FIRST_COMPLETED"
                        ).done
                except TimeoutError:
                    ahead = AHEAD * sum(self._threads().values())
                    continue
                except distributed.CancelledError as error:
                    raise self._lost(error) from None
                for future in done:
                    try:
                        found = self._result(future, running[future])
                    except TimeoutError:
                        # It was lost with the worker that had it, and is asked again.
                        self._threads()
                        continue
                    yield Portion(running.pop(future), found)
                    future.release()
        finally:
            for future in running:
                future.release()

    def _result(self, future: Any, part: Part) -> PartAnswer:
        try:
            found: PartAnswer = future.result(timeout=LOOK_EVERY)
        except (RecordingError, TimeoutError):
            raise
        except distributed.KilledWorker:
            raise RecordingError(
                f"workers end while they look at {part}: allow them less memory each with --memory,"
                " or give them more"
            ) from None
        except (distributed.CancelledError, OSError) as error:
            raise self._lost(error) from None
        except Exception as error:
            # Whatever a worker that is not as it should be raises, such as ModuleNotFoundError.
            raise RecordingError(
                f"a worker cannot look at {part}: {reason(error)}; install "
                "guestio[record,cluster] of this version there"
            ) from error
        if found.same != SAME:
            raise RecordingError(
                "a worker has another version of guestio, which asks other questions"
            )
        return found

    def close(self) -> None:
        """Let go of the cluster, which is left running."""
        self._client.close(timeout=5)
