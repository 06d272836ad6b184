"""Outputs of engines on their way to the ingress, on sockets of their own.

Requests go to attention replicas through Serve's handles, which choose, count and cancel. A stream of Serve's costs a
message through Ray for each token of each request; here one message carries what an engine's step gave to all requests
of an ingress.
"""
