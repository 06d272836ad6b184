"""Spans of requests, from the ingress to the dispatches of their layers, and the ids that log lines carry.

With `telemetry.traces_endpoint` null there is no tracer, and nothing of this runs but what finds a request's id.
"""
