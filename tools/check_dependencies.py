# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check that requirements/ and docs/dependencies.md name the same packages, in ranges."""

from __future__ import annotations

import re
import sys
from collections import Counter

from lay_out_collection import ROOT

PAGE = ROOT / "docs" / "dependencies.md"
ROW = re.compile(r"^\| ([a-z0-9.+-]+) \| ([a-z-]+) \| (.+) \|$", re.MULTILINE)
REQUIREMENT = re.compile(r"([A-Za-z0-9._+-]+)\s*(.*)")


def required() -> list[tuple[str, str, str]]:
    """Return (package, file's name without suffix, version range) of every requirement."""
    found = []
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        for line in path.read_text().splitlines():
            content = line.partition("#")[0].strip()
            match = REQUIREMENT.fullmatch(content)
            if match:
                versions = match.group(2).partition(";")[0].rstrip()
                found.append((match.group(1), path.stem, versions))
    return found


def main() -> int:
    """Print what disagrees; 1 when anything does."""
    wrong = []
    requirements = required()
    files = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    documented = {
        (package, file) for package, file, _reason in ROW.findall(PAGE.read_text()) if file in files
    }
    needed = {(package, file) for package, file, _range in requirements}
    wrong += [
        f"{package} ({file}): no reason in {PAGE.name}" for package, file in needed - documented
    ]
    wrong += [
        f"{package} ({file}): explained, not required" for package, file in documented - needed
    ]
    counts = Counter(package for package, _file, _range in requirements)
    wrong += [
        f"{package}: required in {count} places" for package, count in counts.items() if count > 1
    ]
    wrong += [
        f"{package} ({file}): the range needs a lower and an upper bound, like >=1.2,<2"
        for package, file, versions in requirements
        if not file.startswith("debian-") and not re.fullmatch(r">=[\d.]+,<[\d.]+", versions)
    ]
    print("\n".join(sorted(wrong)) or f"{len(requirements)} packages, each with its reason")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
