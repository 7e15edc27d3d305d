"""The sub-commands of git that a client may call, and the options each one takes.

Owns the table alone; `git.py` reads calls by it. An option that is not here is refused, and so is
every abbreviation. Left out on purpose is whatever runs a program, opens an editor or a prompt, or
reads or writes a file anywhere: docs/howto/git-guard.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

# How the tables are read: `-q` and `--quiet` take no value. `--name=KIND` takes one, after `=` or
# as the next word. `--name?KIND` takes one only attached. `--name~KIND` takes the next word unless
# it is the last. `-#` is a number such as -5. KIND is empty (any one word that is no option), TEXT
# (any word at all), PATH, STRATEGY or FORMAT. `--no-X` is allowed wherever `--X` is.
_DIFF = """
    -p -u --patch -s --no-patch --raw --patch-with-raw --patch-with-stat -U? --unified? --numstat
    --shortstat --dirstat? --summary --name-only --name-status --stat? --stat-width=
    --stat-name-width= --stat-count= --compact-summary --binary --full-index --color? --abbrev?
    --src-prefix= --dst-prefix= --no-prefix --line-prefix= -M? --find-renames? -C? --find-copies?
    -B? --break-rewrites? -D --find-copies-harder --no-renames -l= --minimal --patience --histogram
    --diff-algorithm= --anchored= --indent-heuristic -w --ignore-all-space -b --ignore-space-change
    --ignore-space-at-eol --ignore-cr-at-eol --ignore-blank-lines -I= --ignore-matching-lines=
    --word-diff? --word-diff-regex= --color-words? --color-moved? --color-moved-ws= -a --text -R
    --relative? --exit-code --quiet --check -W --function-context --inter-hunk-context= -z
    --ignore-submodules? -S=TEXT -G=TEXT --pickaxe-all --pickaxe-regex --diff-filter= --find-object=
    --ws-error-highlight= -r -t -c --cc -m --no-textconv --no-ext-diff
"""
_REVISIONS = """
    -# -n= --max-count= --skip= --since= --after= --until= --before= --author=TEXT --committer=TEXT
    --grep=TEXT -i --regexp-ignore-case --invert-grep --all-match -E --extended-regexp -F
    --fixed-strings -P --perl-regexp --merges --min-parents= --max-parents= --first-parent --all
    --branches? --tags? --remotes? --glob= --exclude= --reverse --date-order --topo-order
    --author-date-order --left-right --left-only --right-only --cherry --cherry-pick --cherry-mark
    --boundary --ancestry-path? --simplify-by-decoration --full-history --dense --sparse
    --simplify-merges --show-pulls --remove-empty --not --no-walk? --do-walk -g --walk-reflogs
    --pretty?FORMAT --format=FORMAT --oneline --abbrev-commit --date= --relative-date --parents
    --children --graph --encoding= --no-min-parents --no-max-parents
"""
_LOG = f"""{_DIFF} {_REVISIONS}
    --follow --decorate? --decorate-refs= --decorate-refs-exclude= --clear-decorations --source
    --mailmap --use-mailmap --notes? --show-notes? --no-notes --full-diff --log-size -L= -q
    --expand-tabs? --merge
"""
_REFS = """
    --sort= --points-at~ --contains~ --no-contains~ --with~ --without~ --merged~ --no-merged~
    --format=FORMAT --color? -i --ignore-case
"""
_STRATEGY = "-X= --strategy-option= --strategy=STRATEGY --rerere-autoupdate"
_SEQUENCE = f"""{_STRATEGY}
    --continue --abort --skip --quit -n --no-commit -e --edit -s --signoff -m= --mainline=
    --cleanup=
"""
_STASH_SAVE = "-k --keep-index -S --staged -u --include-untracked -a --all -q --quiet"
_BISECT_NEW = "--term-new= --term-bad= --term-good= --term-old= --no-checkout --first-parent"

# Sub-command, or sub-command and action: what it takes. Checked against the real git's own lists
# in tests/domain/test_git.py.
_OPTIONS = {
    "status": """-v --verbose -s --short -b --branch --show-stash --ahead-behind --porcelain? --long
        -z --null -u? --untracked-files? --ignored? --ignore-submodules? --column? --no-renames
        --find-renames?""",
    "log": _LOG,
    "show": _LOG,
    "diff": f"{_DIFF} --cached --staged --merge-base -1 -2 -3 -0 --base --ours --theirs",
    "range-diff": f"{_DIFF} --creation-factor= --no-dual-color --left-only --right-only",
    "add": """-n --dry-run -v --verbose -f --force -u --update -A --all -N --intent-to-add --refresh
        --ignore-errors --ignore-missing --renormalize --ignore-removal --chmod= --sparse""",
    "commit": """-q --quiet -v --verbose -F=PATH --file=PATH --author=TEXT --date= -m=TEXT
        --message=TEXT -C= --reuse-message= --fixup= --squash= --reset-author --trailer=TEXT -s
        --signoff -e --edit --cleanup= --status --no-gpg-sign -a --all -i --include -o --only -n
        --verify --dry-run --short --branch --ahead-behind --porcelain --long -z --null --amend
        --no-post-rewrite -u? --untracked-files? --allow-empty --allow-empty-message""",
    "checkout": """-b= -B= -l --guess --overlay -q --quiet --progress -m --merge --conflict= -d
        --detach -t --track? -f --force --orphan= --overwrite-ignore --ignore-other-worktrees -2
        --ours -3 --theirs --ignore-skip-worktree-bits""",
    "switch": """-c= --create= -C= --force-create= --guess --discard-changes -q --quiet --progress
        -m --merge --conflict= -d --detach -t --track? -f --force --orphan=
        --ignore-other-worktrees""",
    "restore": """-s= --source= -S --staged -W --worktree --ignore-unmerged --overlay -q --quiet
        --progress -m --merge --conflict= -2 --ours -3 --theirs --ignore-skip-worktree-bits""",
    "branch": f"""{_REFS} -v --verbose -q --quiet -t --track? -u= --set-upstream-to=
        --unset-upstream -r --remotes --abbrev? -a --all -d --delete -D -m --move -M -c --copy -C -l
        --list --show-current --create-reflog -f --force --column?""",
    "tag": f"""{_REFS} -l --list -n? -d --delete -a --annotate -m=TEXT --message=TEXT -F=PATH
        --file=PATH --cleanup= -f --force --create-reflog --column? --no-sign""",
    "fetch": """-v --verbose -q --quiet --all --set-upstream -a --append --atomic -f --force -m
        --multiple -t --tags -j= --jobs= -p --prune -P --prune-tags -n --dry-run --write-fetch-head
        -k --keep --progress --depth= --shallow-since= --shallow-exclude= --deepen= --unshallow
        --refetch --update-shallow --refmap= -o= --server-option= -4 --ipv4 -6 --ipv6 --filter=
        --auto-maintenance --auto-gc --show-forced-updates --no-recurse-submodules""",
    "pull": f"""{_STRATEGY} -s=STRATEGY -v --verbose -q --quiet --progress -r? --rebase? -n --stat
        --summary --log? --signoff --squash --commit --edit --cleanup= --ff --ff-only --verify
        --autostash --allow-unrelated-histories --all -a --append -f --force -t --tags -p --prune
        --dry-run -k --keep --depth= --shallow-since= --shallow-exclude= --deepen= --unshallow
        --update-shallow -4 --ipv4 -6 --ipv6 --set-upstream --no-recurse-submodules""",
    "push": """-v --verbose -q --quiet --all --mirror -d --delete --tags -n --dry-run --porcelain -f
        --force --force-with-lease? --force-if-includes --thin -u --set-upstream --progress --prune
        --verify --follow-tags --atomic -o= --push-option= -4 --ipv4 -6 --ipv6 --no-signed
        --no-recurse-submodules""",
    "clone": """-v --verbose -q --quiet --progress --reject-shallow -n --no-checkout --bare --mirror
        --no-hardlinks -j= --jobs= -o= --origin= -b= --branch= --depth= --shallow-since=
        --shallow-exclude= --single-branch --no-tags --server-option= -4 --ipv4 -6 --ipv6 --filter=
        --sparse --no-recurse-submodules""",
    "ls-remote": "-q --quiet -t --tags --heads --refs --get-url --sort= --exit-code --symref",
    "merge": f"""{_STRATEGY} -s=STRATEGY -n --stat --summary --log? --squash --commit -e --edit
        --cleanup= --ff --ff-only -m=TEXT --message=TEXT -F=PATH --file=PATH --into-name= -v
        --verbose -q --quiet --abort --quit --continue --allow-unrelated-histories --progress
        --autostash --overwrite-ignore --signoff --verify --no-gpg-sign""",
    "rebase": f"""{_STRATEGY} -s=STRATEGY --onto= --keep-base --verify -q --quiet -v --verbose -n
        --stat --signoff --committer-date-is-author-date --reset-author-date --ignore-date
        --ignore-whitespace --whitespace= -f --force-rebase --no-ff --continue --skip --abort --quit
        --show-current-patch --apply -m --merge -i --interactive --empty= -k --keep-empty
        --autosquash --update-refs --autostash -r? --rebase-merges? --fork-point --root
        --reapply-cherry-picks --no-gpg-sign""",
    "cherry-pick": f"""{_SEQUENCE} -x --ff --allow-empty --allow-empty-message
        --keep-redundant-commits --no-gpg-sign""",
    "revert": f"{_SEQUENCE} --reference --no-gpg-sign",
    "reset": "-q --quiet --no-refresh --mixed --soft --hard --merge --keep -N --intent-to-add",
    "stash": f"{_STASH_SAVE} -m=TEXT --message=TEXT",
    "stash push": f"{_STASH_SAVE} -m=TEXT --message=TEXT",
    "stash save": _STASH_SAVE,
    "stash pop": "-q --quiet --index",
    "stash apply": "-q --quiet --index",
    "stash drop": "-q --quiet",
    "stash branch": "",
    "stash clear": "",
    "stash list": _LOG,
    "stash show": f"{_DIFF} -u --include-untracked --only-untracked",
    "remote": "-v --verbose",
    "remote add": "-t= -m= -f --fetch --tags",
    "remote remove": "",
    "remote rm": "",
    "remote rename": "--progress",
    "remote get-url": "--push --all",
    "remote set-url": "--push --add --delete",
    "remote set-head": "-a --auto -d --delete",
    "remote set-branches": "--add",
    "remote show": "-n",
    "remote prune": "-n --dry-run",
    "remote update": "-p --prune",
    "rev-parse": """--verify -q --quiet --short? --abbrev-ref? --symbolic --symbolic-full-name --all
        --branches? --tags? --remotes? --revs-only --no-revs --flags --no-flags --not
        --show-toplevel --show-prefix --show-cdup --is-inside-work-tree --is-inside-git-dir
        --is-bare-repository --is-shallow-repository --git-common-dir --absolute-git-dir
        --show-object-format?""",
    "rev-list": f"""{_REVISIONS} --count --objects --header --timestamp --disk-usage?
        --no-commit-header --max-age= --min-age=""",
    "ls-files": """-c --cached -d --deleted -m --modified -o --others -i --ignored -s --stage -k
        --killed --directory --no-empty-directory -u --unmerged --resolve-undo -x= --exclude=
        --exclude-standard --full-name --error-unmatch --with-tree= --abbrev? --deduplicate -z -t -v
        -f --eol --sparse --format=""",
    "ls-tree": """-d -r -t -l --long -z --name-only --name-status --object-only --full-name
        --full-tree --format= --abbrev?""",
    "cat-file": "-t -s -e -p",
    "show-ref": "--tags --heads --verify --head -d --dereference -s? --hash? --abbrev? -q --quiet",
    "for-each-ref": f"{_REFS} --count=",
    "merge-base": "-a --all --octopus --independent --is-ancestor --fork-point",
    "name-rev": "--name-only --tags --refs= --exclude= --all --undefined --always",
    "cherry": "-v --verbose --abbrev?",
    "describe": """--contains --all --tags --long --first-parent --abbrev? --exact-match
        --candidates= --match= --exclude= --always --dirty? --broken?""",
    "blame": """-L= -b --root --show-stats --progress -f --show-name -n --show-number -p --porcelain
        --line-porcelain --incremental -c -t -l -s -e --show-email -w --ignore-rev=
        --ignore-revs-file=PATH --color-lines --color-by-age --minimal -C? -M? --abbrev? --date=
        --since= --first-parent --reverse --no-textconv""",
    "grep": """-# --cached --untracked --exclude-standard -v --invert-match -i --ignore-case -w
        --word-regexp -a --text -I -r --recursive --max-depth= -E --extended-regexp -G
        --basic-regexp -F --fixed-strings -P --perl-regexp -n --line-number --column -h -H
        --full-name -l --files-with-matches --name-only -L --files-without-match -z --null -o
        --only-matching -c --count --color? --break --heading -C= --context= -B= --before-context=
        -A= --after-context= --threads= -p --show-function -W --function-context -f=PATH -e=TEXT
        --and --or --not -q --quiet --all-match -m= --max-count= --no-textconv""",
    "shortlog": """-c --committer -n --numbered -s --summary -e --email --group= -w? --all
        --branches? --tags? --remotes? --since= --after= --until= --before= --author=TEXT
        --grep=TEXT --merges --first-parent --max-count= --format=FORMAT""",
    "reflog": _LOG,
    "reflog show": _LOG,
    "reflog exists": "",
    "clean": "-q --quiet -n --dry-run -f --force -d -e= --exclude= -x -X",
    "mv": "-v --verbose -n --dry-run -f --force -k --sparse",
    "rm": "-n --dry-run -q --quiet --cached -f --force -r --ignore-unmatch --sparse",
    "init": "--bare -q --quiet -b= --initial-branch= --object-format=",
    "config": "--local --get --get-all",
    "worktree list": "--porcelain -z -v --verbose --expire=",
    "worktree add": """-f --force -b= -B= -d --detach --checkout --lock --reason=TEXT -q --quiet
        --track --guess-remote""",
    "worktree remove": "-f --force",
    "worktree prune": "-n --dry-run -v --verbose --expire=",
    "worktree move": "-f --force",
    "worktree lock": "--reason=TEXT",
    "worktree unlock": "",
    "bisect start": _BISECT_NEW,
    "bisect bad": "",
    "bisect new": "",
    "bisect good": "",
    "bisect old": "",
    "bisect skip": "",
    "bisect next": "",
    "bisect reset": "",
    "bisect log": "",
    "bisect terms": "--term-good --term-bad --term-old --term-new",
    "apply": """--exclude= --include= --no-add --stat --numstat --summary --check --index -N
        --intent-to-add --cached --apply -3 --3way -z -p= -C= --whitespace= --ignore-space-change
        --ignore-whitespace -R --reverse --unidiff-zero --reject --allow-overlap -v --verbose -q
        --quiet --inaccurate-eof --recount --directory=PATH --allow-empty --binary""",
    "am": """-3 --3way -q --quiet -s --signoff -u --utf8 -k --keep --keep-non-patch -m --message-id
        --keep-cr -c --scissors --quoted-cr= --whitespace= --ignore-space-change
        --ignore-whitespace --directory=PATH --exclude= --include= -C= -p= --patch-format= --reject
        --continue -r --resolved --skip --abort --quit --show-current-patch? --allow-empty
        --committer-date-is-author-date --ignore-date --rerere-autoupdate --empty= --no-gpg-sign""",
    "format-patch": f"""{_DIFF} -# -o=PATH --output-directory=PATH --stdout -n --numbered -N
        --no-numbered --signoff --cover-letter --start-number= -v= --reroll-count=
        --subject-prefix= --to=TEXT --cc=TEXT --rfc -k --keep-subject --zero-commit --base=
        --thread? -q --root""",
    "count-objects": "-v --verbose -H --human-readable",
    "fsck": "-v --verbose --unreachable --dangling --tags --root --full --strict --progress",
    "gc": "-q --quiet --auto --aggressive --prune?",
    "version": "--build-options",
}

_TOKEN = re.compile(r"(--?[^=?~]+)([=?~])?(.*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """How an option takes its value (`=`, `?`, `~` or not at all) and what that may be."""

    takes: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What one sub-command takes. Its name is the first `words` words of a call; `has_actions`
    says that an operand would be read as an action, as in `stash pop`.
    """

    name: str
    words: int
    options: Mapping[str, Option]
    has_actions: bool


def _options(table: str) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for token in table.split():
        if (match := _TOKEN.fullmatch(token)) is None:
            raise ValueError(f"bad token {token!r}")
        found[match[1]] = Option(takes=match[2] or "", kind=match[3])
    negated = [name for name in found if name.startswith("--") and not name.startswith("--no-")]
    return {f"--no-{name[2:]}": Option(takes="", kind="") for name in negated} | found


RULES = {
    name: Rule(
        name=name,
        words=len(name.split()),
        options=_options(table),
        has_actions=any(other.startswith(f"{name} ") for other in _OPTIONS),
    )
    for name, table in _OPTIONS.items()
}
SUBCOMMANDS = frozenset(name.split()[0] for name in RULES)
