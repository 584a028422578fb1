"""What pyproject.toml cannot say of a source distribution and of the description.

lorafx/passes and lorafx/kernels are links to the folders at the root. setuptools takes files alone,
so they are added here: once as links, and not as copies of what they lead to.

Links of README.md lead into the repository. With a `Source` among pyproject's urls they are made
absolute; without one they could lead nowhere, so their text is all that is left of them.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
LINKS = ("lorafx/passes", "lorafx/kernels")
#: `![alt](target)` or `[text](target)`, with a target in the repository or on the page itself.
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")


class SdistWithLinks(sdist):
    """setuptools' own, with the links."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """What the archive is made of."""
        super().make_release_tree(base_dir, files)
        for link in LINKS:
            os.symlink(os.readlink(ROOT / link), Path(base_dir, link))


def description(readme: str, source: str | None) -> str:
    """`readme` for a page outside of the repository, which is at `source`."""

    def elsewhere(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if target.startswith("#"):
            return match[0]
        if source is None:
            return "" if image else text
        return f"{image}[{text}]({source}/{'raw' if image else 'blob'}/HEAD/{target})"

    return _LINK.sub(elsewhere, readme)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    setup(
        cmdclass={"sdist": SdistWithLinks},
        long_description=description(
            (ROOT / "README.md").read_text(), project.get("urls", {}).get("Source")
        ),
        long_description_content_type="text/markdown",
    )
