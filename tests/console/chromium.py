"""Debian's Chromium for Playwright, whose own download of browsers isn't wanted here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PACKAGES = ("chromium", "fonts-dejavu-core")


def installed() -> str | None:
    """Path of a Chromium; None if there is none."""
    return next((path for name in _NAMES if (path := shutil.which(name)) is not None), None)


def why_not() -> str | None:
    """Why there is no Chromium; None if there is one, after Debian's was installed if this is root on Debian."""
    if installed() is not None:
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "no Chromium is installed, and only root on Debian can install it"
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(install, capture_output=True, text=True, env=environment)
    if done.returncode:  # a machine whose lists of packages are old or were never read
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        done = subprocess.run(install, capture_output=True, text=True, env=environment)
    return None if installed() is not None else f"Debian's Chromium can't be had: {done.stderr.strip()[-200:]}"


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless one."""
    with sync_playwright() as playwright:
        # Its sandbox needs user namespaces, which root in a container has not.
        yield (running := playwright.chromium.launch(executable_path=installed(), args=["--no-sandbox"]))
        running.close()


@dataclass
class Visit:
    """A page, and what it did that a console must not do."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """Of scripts and of the page's policy."""
    elsewhere: list[str] = field(default_factory=list)
    """URLs of other servers that were asked."""


def visit(context: BrowserContext, url: str) -> Visit:
    """A new page, which has gone nowhere yet, and is to ask nobody but `url`."""
    seen = Visit(context.new_page())
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))
    seen.page.on("console", lambda said: seen.errors.append(said.text) if _is_error(said.type, said.text) else None)
    seen.page.on("request", lambda asked: None if asked.url.startswith(url) else seen.elsewhere.append(asked.url))
    return seen


def _is_error(kind: str, text: str) -> bool:
    """Answers that are no success are told to the page's console, too; what the page makes of them is tested."""
    return kind == "error" and not text.startswith("Failed to load resource")
