"""What Ray says when it fails, in words for a user; the classes are Ray's own."""

from __future__ import annotations

import pytest
import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.data.exceptions import ExecutionTimeoutError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from pipelines.contracts import Shard
from pipelines.errors import StalledError, StorageError, VecmillError, WorkerError
from pipelines.failures import plain_errors
from pipelines.ledger import Work

STALL = """Dataset execution made no progress for at least 61s of scheduling time (timeout: 60s).
Operators still running:
  - ReadReadShards: 3 active task(s), 1 finished, 4 outputs taken
  - MapBatches(Decode): 0 active task(s), 4 finished, 4 outputs taken
  - Write: 1 active task(s), 0 finished, 0 outputs taken
If this is expected, ..."""
PENDING = [Work(Shard(f"{at}-000000000000", f"s3://bucket/{at}.tar", "tar", "v1", 1), ("clip",)) for at in range(5)]


def died(class_name: str) -> Exception:
    """As Ray tells of an actor that is gone for good."""
    context = ActorDiedErrorContext(error_message="its worker died", class_name=class_name, actor_id=bytes(16))
    error: Exception = ray.exceptions.ActorDiedError(context)
    return error


def told(error: BaseException) -> VecmillError:
    with pytest.raises(VecmillError) as caught, plain_errors(lambda: PENDING, 60):
        raise error
    return caught.value


def test_a_stall_names_the_stages_at_work_and_the_shards() -> None:
    error = told(ExecutionTimeoutError(STALL))
    assert isinstance(error, StalledError)
    assert error.what == (
        "Nothing has moved for 60 s. Stalled: read (3 tasks), write (1 tasks). "
        "5 shards are not done: s3://bucket/0.tar, s3://bucket/1.tar, s3://bucket/2.tar"
    )


def test_a_stall_of_a_cluster_without_room_and_a_store_that_is_silent_too() -> None:
    def silent() -> list[Work]:
        raise StorageError("Cannot list s3://bucket/out: no answer")

    idle = STALL.replace("3 active", "0 active").replace("1 active", "0 active")
    says = "read has no task at work: its processes do not start.*cannot be told: Cannot list s3://bucket/out"
    with pytest.raises(StalledError, match=says), plain_errors(silent, 60):
        raise ExecutionTimeoutError(idle)


def test_a_stall_of_a_command_without_the_setting_does_not_name_it() -> None:
    with pytest.raises(StalledError) as caught, plain_errors():
        raise ExecutionTimeoutError(STALL)
    assert caught.value.what.endswith("s. Stalled: read (3 tasks), write (1 tasks).")
    assert "cluster." not in caught.value.fix


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ray.exceptions.ActorDiedError(), "An actor cannot start.*Ray's logs tell more"),
        (died("MapWorker(MapBatches(Encode))"), "The encode actor cannot start.*encode.batch_size"),
        (died("MapWorker(MapBatches(Translate))"), "The translate actor cannot start.*translate.batch_size"),
        (ray.exceptions.OutOfDiskError("disk is full"), "object store is full.*disk is full"),
        (ray.exceptions.ObjectStoreFullError("no room"), "object store is full.*no room"),
        (ray.exceptions.WorkerCrashedError(), "process of Ray's died"),
        (ray.exceptions.OutOfMemoryError("killed for memory"), "died.*killed for memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_happened_to_rays_processes_is_told(error: Exception, says: str) -> None:
    wrapped = RuntimeError("of the executor")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        explained = told(each)
        assert isinstance(explained, WorkerError) and explained.fix
        with pytest.raises(WorkerError, match=f"(?s){says}"):
            raise explained


def test_our_own_error_comes_out_of_rays_wrapping_as_it_was() -> None:
    """Whose class is made to be one of ours too, but whose text is a traceback."""
    own = StorageError("Cannot write s3://bucket/out", "Look.")
    wrapped = ray.exceptions.RayTaskError("write", "Traceback: ...", own).as_instanceof_cause()
    assert isinstance(wrapped, StorageError) and "Traceback" in str(wrapped)
    assert told(wrapped) is own


def test_a_task_that_finds_the_store_full_tells_why_without_its_traceback() -> None:
    cause = ray.exceptions.OutOfDiskError("Local disk is full")
    wrapped = ray.exceptions.RayTaskError("read", "Traceback: ...", cause).as_instanceof_cause()
    assert told(wrapped).what.endswith("the disk that it spills to: Local disk is full")


@pytest.mark.parametrize("by_a_task", [False, True])
@pytest.mark.parametrize("by_the_controller", [False, True])
def test_of_a_training_run_the_workers_own_error_is_told(by_a_task: bool, by_the_controller: bool) -> None:
    error = own = StorageError("Cannot read s3://bucket/in", "Look.")
    if by_a_task:
        error = ray.exceptions.RayTaskError("read", "Traceback: ...", own).as_instanceof_cause()
    failures = {1: ConnectionError("by the other"), 0: error}
    assert told(ControllerError(error) if by_the_controller else WorkerGroupError("Traceback: ...", failures)) is own


def test_what_is_no_error_of_ours_in_a_training_run_stays_rays() -> None:
    with pytest.raises(WorkerGroupError), plain_errors(lambda: PENDING, 60):
        raise WorkerGroupError("Traceback: ...", {0: ZeroDivisionError()})


def test_what_nobody_knows_stays_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), plain_errors(lambda: PENDING, 60):
        raise ZeroDivisionError
