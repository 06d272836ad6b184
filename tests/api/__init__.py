"""The HTTP API as somebody who means it ill asks it: what its own OpenAPI document makes up, and what people think of.

    python -m tests.api.run                 # several thousand requests, some minutes; prints a JSON report

`front` serves the ingress' real application in this process; `campaign` lets schemathesis make up requests from its
document; `judge` says what an answer may be.
"""
