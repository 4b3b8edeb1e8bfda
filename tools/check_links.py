# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check that every relative link in the Markdown files leads to a file and its heading.

Usage: tools/check_links.py [ARTIFACT]   the pages of a built collection, which lacks some files
"""

from __future__ import annotations

import re
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from lay_out_collection import ROOT, source_files

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(
    r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)|^\[[^\]]+\]:\s+(\S+)", re.MULTILINE
)
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that a Markdown page's headings get, as GitHub makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        anchor = base = words.replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{base}-{number}"
        found.add(anchor)
    return found


def broken_links(page: Path, root: Path) -> list[str]:
    """Return a line for each relative link of the page that leads nowhere below the root."""
    text = page.read_text(encoding="utf-8")
    broken = []
    for match in LINK.finditer(CODE.sub("", FENCE.sub("", text))):
        link = match.group(1) or match.group(2)
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        name, _hash, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        where = f"{page.relative_to(root)}: {link}"
        if not target.is_relative_to(root) or not target.exists():
            broken.append(f"{where}: no such file")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{where}: no such heading")
    return broken


def check(pages: list[Path], root: Path) -> int:
    """Print the broken links of the pages; 1 when there are any."""
    broken = [line for page in pages for line in broken_links(page, root)]
    print("\n".join(broken) or f"{len(pages)} pages, no broken link")
    return 1 if broken else 0


# Python 3.11 before 3.11.4, as Debian 12 has it, knows no filters.
SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def main(arguments: list[str]) -> int:
    """Check the project's pages, or those of the artifact that is named."""
    if not arguments:
        return check([ROOT / name for name in source_files() if name.endswith(".md")], ROOT)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        with tarfile.open(arguments[0]) as artifact:
            artifact.extractall(root, **SAFELY)
        return check(sorted(root.rglob("*.md")), root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
