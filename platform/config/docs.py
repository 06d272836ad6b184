"""`python -m expertmesh.platform.config.docs > docs/configuration.md` writes the reference of the configuration."""

from __future__ import annotations

import sys

from expertmesh.platform.config.markdown import configuration_markdown

if __name__ == "__main__":
    sys.stdout.write(configuration_markdown())
