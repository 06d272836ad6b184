"""Sending tokens to experts and adding up what comes back."""

from expertmesh.routing.dispatch.dispatcher import Dispatcher
from expertmesh.routing.dispatch.mailbox import LoadCounters, Mailbox, StaticTable, TableFile, TableSource
from expertmesh.routing.dispatch.outage import FailedRows
from expertmesh.routing.dispatch.samples import DispatchSample, FrameSample, SampledDispatcher, Sampler
from expertmesh.routing.dispatch.settings import DispatchSettings
from expertmesh.routing.dispatch.sharing import POLICIES, Policy, create_policy

__all__ = [
    "POLICIES",
    "DispatchSample",
    "DispatchSettings",
    "Dispatcher",
    "FailedRows",
    "FrameSample",
    "LoadCounters",
    "Mailbox",
    "Policy",
    "SampledDispatcher",
    "Sampler",
    "StaticTable",
    "TableFile",
    "TableSource",
    "create_policy",
]
