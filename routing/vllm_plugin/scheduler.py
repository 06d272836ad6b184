"""vLLM's scheduler, which ends the requests that a step could not compute and goes on with the others.

Where experts are missing for good, the dispatcher notes the rows of the step that need them (`FailedRows`). Their
requests end with an error; so does every other that reads a KV block which the failed ones wrote in this step. These
blocks leave the prefix cache, and copies of them that are on their way to a KV store are dropped: what they hold means
nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from expertmesh.errors import Unavailable
from expertmesh.routing.vllm_plugin import op
from expertmesh.routing.vllm_plugin.settings import TRACEPARENT, UNAVAILABLE

log = init_logger(__name__)


class MeshScheduler(Scheduler):
    """Runs in the process that runs the model, and without steps that overlap: both hold for our engines."""

    def schedule(self, *args: bool, **kwargs: bool) -> SchedulerOutput:
        """As vLLM's. What failed before the step (a warm-up) concerns no request."""
        op.failed_rows.take()
        output = super().schedule(*args, **kwargs)
        if op.sampler is not None:
            op.sampler.step(self._traced(output.num_scheduled_tokens))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's, for the requests whose rows were all computed."""
        rows, why = op.failed_rows.take()
        if not rows:
            return super().update_from_output(scheduler_output, model_runner_output)
        tokens = scheduler_output.num_scheduled_tokens
        order = sorted(model_runner_output.req_id_to_index.items(), key=lambda item: item[1])
        ended = self._end(requests_of(rows, [(name, tokens.get(name, 0)) for name, _ in order]), tokens, why)
        self._drop_copies()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for client, output in ended:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        return outputs

    def _traced(self, scheduled: Iterable[str]) -> list[str]:
        """What names the traced ones of these requests: their replica passes trace headers on for no others."""
        headers = (self.requests[name].trace_headers for name in scheduled)
        return [sent[TRACEPARENT] for sent in headers if sent]

    def _end(self, failed: set[str], tokens: dict[str, int], why: str) -> list[tuple[int, EngineCoreOutput]]:
        """Ends requests and those that share what they wrote: (client, last output) of each."""
        failed &= self.requests.keys()
        written: set[int] = set()
        for name in failed:
            written |= self._written(name, tokens[name])
        readers = {request.request_id for request in self.running if self._blocks(request.request_id) & written}
        self.kv_cache_manager.evict_blocks(written)
        log.warning("%d requests end: %s", len(failed | readers), why)
        return [
            (
                request.client_index,
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=UNAVAILABLE + why,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                ),
            )
            for request in self.finish_requests(failed | readers, RequestStatus.FINISHED_ERROR)
        ]

    def _drop_copies(self) -> None:
        """Forgets every block that is being copied out or was, on this side of the store.

        Raises Unavailable, which ends the engine, if a request waits for blocks that are coming in: vLLM can't forget
        these. Its requests go on at another replica.
        """
        if self.connector is None:
            return
        if any(request.status == RequestStatus.WAITING_FOR_REMOTE_KVS for request in self.kv_holding_waiting):
            raise Unavailable("a step failed while KV blocks were being loaded")
        self.reset_connector_cache()

    def _written(self, name: str, tokens: int) -> set[int]:
        """Ids of the blocks that hold the tokens of this step."""
        first = self.requests[name].num_computed_tokens - tokens
        written: set[int] = set()
        groups = self.kv_cache_config.kv_cache_groups
        for group, blocks in zip(groups, self.kv_cache_manager.get_block_ids(name), strict=True):
            written.update(blocks[first // group.kv_cache_spec.block_size :])
        return written - {self._no_block}

    def _blocks(self, name: str) -> set[int]:
        return {block for blocks in self.kv_cache_manager.get_block_ids(name) for block in blocks} - {self._no_block}

    @property
    def _no_block(self) -> int:
        """Stands for blocks outside a sliding window, in every request."""
        return int(self.kv_cache_manager.block_pool.null_block.block_id)


def requests_of(rows: Sequence[int], requests: Sequence[tuple[str, int]]) -> set[str]:
    """Whose rows these are.

    requests: (id, tokens of the step), in the order of the rows; rows beyond them are padding.
    """
    ends = list(accumulate(tokens for _, tokens in requests))
    owners = (bisect_right(ends, row) for row in rows)
    return {requests[owner][0] for owner in owners if owner < len(requests)}
