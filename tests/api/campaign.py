"""schemathesis makes up requests from the API's own document, right and wrong ones, and every answer is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, Config, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.api.document import Document
from tests.api.judge import fault

TIMEOUT_S = 60.0
"""An answer that takes longer is a finding."""
_CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
_MOST_FINDINGS = 5
"""Of one operation: the rest are most likely the same."""


@dataclass
class Report:
    """What a campaign did."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    by_operation: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, str]] = field(default_factory=list)
    """`operation`, `what` is wrong, and the `request` as a curl command."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "requests": self.requests,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "by_operation": dict(self.by_operation),
            "findings": self.findings,
        }


class Campaign:
    """Feeds documents' operations, and keeps one report."""

    def __init__(self, url: str, start: int) -> None:
        """start: the same one makes the same requests."""
        self.report = Report()
        self._url, self._start = url, start
        self._session = requests.Session()

    def run(self, documents: Iterable[Document], cases: int) -> None:
        """`cases` requests to each operation, half of them right by its document."""
        for document in documents:
            for operation in self._operations(document):
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    self._feed(operation, mode, max(1, cases // 2))

    def close(self) -> None:
        """Ends its connections."""
        self._session.close()

    def _operations(self, document: Document) -> Iterator[APIOperation]:
        schema = schemathesis.openapi.from_dict(document, config=Config())
        schema.config.update(base_url=self._url)
        for result in schema.get_all_operations():
            yield result.ok()

    def _feed(self, operation: APIOperation, mode: GenerationMode, cases: int) -> None:
        quiet = settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )

        @seed(self._start)
        @quiet
        @given(case=operation.as_strategy(generation_mode=mode))
        def fed(case: Case) -> None:
            self._ask(case)

        try:
            fed()
        except Unsatisfiable:  # by this document nothing is wrong
            if mode is GenerationMode.POSITIVE:
                raise

    def _ask(self, case: Case) -> None:
        name, report = case.operation.label, self.report
        report.requests += 1
        report.by_operation[name] += 1
        what = _judged(case, lambda: case.call(session=self._session, timeout=TIMEOUT_S), report.statuses)
        if what is not None and sum(f["operation"] == name for f in report.findings) < _MOST_FINDINGS:
            report.findings.append({"operation": name, "what": what, "request": case.as_curl_command()})


def _judged(case: Case, call: Callable[[], schemathesis.Response], statuses: Counter[int]) -> str | None:
    try:
        answer = call()
    except requests.RequestException as error:
        return f"no answer: {error!r}"
    statuses[answer.status_code] += 1
    content_type = (answer.headers.get("content-type") or [""])[0]
    if (what := fault(answer.status_code, content_type, answer.content)) is not None:
        return what
    try:
        case.validate_response(answer, checks=_CHECKS)
    except FailureGroup as failures:
        return "; ".join(f"{failure.title}: {failure.message}" for failure in failures.exceptions)[:1500]
    return None
