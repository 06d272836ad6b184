"""The CloudFormation stack around a mesh: what would change, change it, look at it, end it.

Every change goes through a change set, so that what was shown is what is done.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from expertmesh.platform.aws.calls import asking, client
from expertmesh.platform.aws.changes import Change, Plan
from expertmesh.platform.aws.errors import AwsError
from expertmesh.platform.aws.settings import Infrastructure

TEMPLATE = Path(__file__).with_name("infrastructure.yaml")
MAX_TEMPLATE_BYTES = 51_200
"""The largest template that CloudFormation takes in a request."""

_POLL_S = 5.0
_NOT_THERE = ("REVIEW_IN_PROGRESS", "DELETE_COMPLETE")
_BEYOND_REPAIR = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED", "DELETE_FAILED")
_NO_CHANGES = ("didn't contain changes", "No updates are to be performed")


@dataclass(frozen=True, slots=True)
class Event:
    """One step of CloudFormation's work."""

    resource: str
    kind: str
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resource:
    """One resource of a stack."""

    name: str
    kind: str
    status: str
    physical_id: str


@dataclass(frozen=True, slots=True)
class StackState:
    """A stack as it is now."""

    arn: str
    status: str
    reason: str
    outputs: dict[str, str]
    resources: tuple[Resource, ...]


class Stack:
    """The stack of one `Infrastructure`. Every method raises AwsError for what AWS refuses or can't do.

    `pause` is called between two looks with the seconds to wait.
    """

    def __init__(self, settings: Infrastructure, pause: Callable[[float], None] = time.sleep) -> None:
        self.settings = settings
        self._name = settings.name
        self._aws = client("cloudformation", settings.region)
        self._pause = pause

    def state(self) -> StackState | None:
        """The stack with its outputs and resources; None if it isn't there."""
        described = self._describe(self._name)
        if described is None or described["StackStatus"] in _NOT_THERE:
            return None
        with asking(f"resources of stack {self._name}"):
            pages = self._aws.get_paginator("list_stack_resources").paginate(StackName=self._name)
            found = [each for page in pages for each in page["StackResourceSummaries"]]
        resources = tuple(
            Resource(
                each["LogicalResourceId"],
                each["ResourceType"],
                each["ResourceStatus"],
                each.get("PhysicalResourceId", ""),
            )
            for each in found
        )
        return StackState(
            described["StackId"],
            described["StackStatus"],
            described.get("StackStatusReason", ""),
            {each["OutputKey"]: each["OutputValue"] for each in described.get("Outputs", [])},
            resources,
        )

    def plan(self) -> Plan:
        """A change set from the stack as it is to the settings. Hand it to `execute` or `discard`."""
        creates = self._creates()
        with asking(f"change set of stack {self._name}"):
            made = self._aws.create_change_set(
                StackName=self._name,
                ChangeSetName=f"expertmesh-{uuid.uuid4().hex[:12]}",
                ChangeSetType="CREATE" if creates else "UPDATE",
                TemplateBody=TEMPLATE.read_text(encoding="utf-8"),
                Parameters=[
                    {"ParameterKey": name, "ParameterValue": value}
                    for name, value in self.settings.parameters().items()
                ],
                Capabilities=["CAPABILITY_IAM"],
                Tags=[{"Key": "expertmesh", "Value": self._name}],
            )
        return self._planned(made["Id"], creates)

    def execute(self, plan: Plan, tell: Callable[[Event], None]) -> StackState:
        """Make the planned changes; `tell` gets each step. Returns the stack when all is done.

        Raises AwsError with the reasons if CloudFormation rolled back.
        """
        if plan.change_set is None:
            raise ValueError("a plan without changes can't be executed")
        described = self._describe(self._name)
        arn = self._name if described is None else described["StackId"]
        seen = {event["EventId"] for event in self._events(arn)}
        with asking(f"executing the change set of stack {self._name}"):
            self._aws.execute_change_set(ChangeSetName=plan.change_set)
        self._follow(arn, seen, tell, ("CREATE_COMPLETE", "UPDATE_COMPLETE"))
        state = self.state()
        if state is None:
            raise AwsError(f"stack {self._name} went away while it was changed")
        return state

    def discard(self, plan: Plan) -> None:
        """Forget a plan; of a stack that was only planned nothing stays."""
        if plan.change_set is not None:
            self._delete_change_set(plan.change_set)
        if plan.creates:
            with asking(f"removing the planned stack {self._name}"):
                self._aws.delete_stack(StackName=self._name)

    def delete(self, tell: Callable[[Event], None]) -> None:
        """Delete the stack and all but what its template retains; `tell` gets each step."""
        described = self._describe(self._name)
        if described is None or described["StackStatus"] == "DELETE_COMPLETE":
            return
        arn = described["StackId"]
        seen = {event["EventId"] for event in self._events(arn)}
        with asking(f"deleting stack {self._name}"):
            self._aws.delete_stack(StackName=arn)
        self._follow(arn, seen, tell, ("DELETE_COMPLETE",))

    def _creates(self) -> bool:
        described = self._describe(self._name)
        status = None if described is None else described["StackStatus"]
        if status is None or status in _NOT_THERE:
            return True
        if status in _BEYOND_REPAIR:
            raise AwsError(f"stack {self._name} is {status} and can't be changed; delete it first: expertmesh aws down")
        if status.endswith("_IN_PROGRESS"):
            raise AwsError(f"stack {self._name} is {status}; wait until CloudFormation has ended that")
        return False

    def _planned(self, change_set: str, creates: bool) -> Plan:
        while True:
            with asking(f"change set of stack {self._name}"):
                described = self._aws.describe_change_set(ChangeSetName=change_set)
            match described["Status"]:
                case "CREATE_COMPLETE":
                    return Plan(creates, tuple(self._changes(change_set)), change_set)
                case "FAILED":
                    reason = described.get("StatusReason", "CloudFormation gives no reason")
                    self.discard(Plan(creates, (), change_set))
                    if any(words in reason for words in _NO_CHANGES):
                        return Plan(creates, (), None)
                    raise AwsError(f"stack {self._name} can't be changed to this: {reason}")
                case _:
                    self._pause(_POLL_S)

    def _changes(self, change_set: str) -> list[Change]:
        with asking(f"change set of stack {self._name}"):
            pages = self._aws.get_paginator("describe_change_set").paginate(ChangeSetName=change_set)
            return [Change.parse(each["ResourceChange"]) for page in pages for each in page["Changes"]]

    def _delete_change_set(self, change_set: str) -> None:
        with asking(f"discarding a change set of stack {self._name}"):
            self._aws.delete_change_set(ChangeSetName=change_set)

    def _follow(self, arn: str, seen: set[str], tell: Callable[[Event], None], good: tuple[str, ...]) -> None:
        """Until the stack rests. `seen` are the ids of events that are older, and grows."""
        failures: list[Event] = []
        while True:
            described = self._describe(arn)
            status = "DELETE_COMPLETE" if described is None else described["StackStatus"]
            for event in self._new_events(arn, seen):
                tell(event)
                if event.status.endswith("_FAILED") and "cancelled" not in event.reason:
                    failures.append(event)
            if not status.endswith("_IN_PROGRESS"):
                break
            self._pause(_POLL_S)
        if status not in good:
            lines = [f"{each.resource} ({each.kind}): {each.reason}" for each in failures]
            raise AwsError("\n".join([f"stack {self._name} ended as {status}", *lines]))

    def _new_events(self, arn: str, seen: set[str]) -> list[Event]:
        """In the order in which they happened."""
        found = [event for event in self._events(arn) if event["EventId"] not in seen]
        seen.update(event["EventId"] for event in found)
        return [
            Event(
                event["LogicalResourceId"],
                event["ResourceType"],
                event.get("ResourceStatus", ""),
                event.get("ResourceStatusReason", ""),
            )
            for event in reversed(found)
        ]

    def _events(self, arn: str) -> list[dict[str, Any]]:
        """All events, the newest first."""
        with asking(f"events of stack {self._name}"):
            pages = self._aws.get_paginator("describe_stack_events").paginate(StackName=arn)
            return [event for page in pages for event in page["StackEvents"]]

    def _describe(self, name: str) -> dict[str, Any] | None:
        with asking(f"stack {self._name}"):
            try:
                [found] = self._aws.describe_stacks(StackName=name)["Stacks"]
            except ClientError as error:
                if "does not exist" in str(error):
                    return None
                raise
            return dict(found)
