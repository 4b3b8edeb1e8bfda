# shellcheck shell=bash
# Copyright: dm_remap.storage contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Source it from the repository's root: it puts the virtual environment, the collection and Java
# where Ansible's programs look for them. It also defines find_python and find_java.

# Prints a Python that ansible-core can run on, 3.11 or newer, or nothing.
find_python() {
    local candidate
    for candidate in "${DM_REMAP_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
            2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

# Succeeds when the directory holds a Java runtime of version 17 or newer.
usable_java() {
    local version
    [ -x "$1/bin/java" ] || return 1
    version=$("$1/bin/java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
    [ -n "$version" ] && [ "$version" -ge 17 ]
}

# Prints the home of a Java that the rule engine can load, or nothing.
find_java() {
    local home
    for home in "${JAVA_HOME:-}" /usr/lib/jvm/java-17-* /usr/lib/jvm/java-21-* \
        /usr/lib/jvm/default-java /usr/lib/jvm/*; do
        if [ -n "$home" ] && usable_java "$home"; then
            printf '%s\n' "$home"
            return
        fi
    done
    home=$(command -v java) || return 0
    home=$(dirname "$(dirname "$(readlink -f "$home")")")
    if usable_java "$home"; then
        printf '%s\n' "$home"
    fi
}

export VIRTUAL_ENV="$PWD/.venv"
export PATH="$VIRTUAL_ENV/bin:$PATH"
export ANSIBLE_COLLECTIONS_PATH="$PWD/.build"
export ANSIBLE_NOCOWS=1
# For root in another user's clone, where git would do nothing. Who runs make trusts the clone already.
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'
JAVA_HOME=$(find_java)
export JAVA_HOME
