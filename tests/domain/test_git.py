"""The allow-list of git calls, row by row, and against the real git binary."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rdev.domain.git import GIT_ENVIRONMENT, check_args, git_argv
from rdev.domain.git_options import RULES, SUBCOMMANDS

Git = Callable[..., subprocess.CompletedProcess[str]]

ACCEPTED = """
status --short --branch
status -sb -uall
log --oneline -5
log -n 3 --since=2.weeks --author Ada --format=%H%x09%s main..dev -- src/app.py
log -p -S needle --stat=80 -M90%
log --grep=--exec --graph --all
diff
diff --cached --name-only
diff HEAD~2..HEAD -U5 -- docs
diff main...topic --word-diff=color
show HEAD:README.md
show --stat v1.0^{}
add -A
add -- --exec=evil
commit -am fix
commit -m '- first point' --no-verify
commit --message=--exec -s --author='Ada <a@b>'
commit -m -- --allow-empty
commit --amend --no-edit
commit -F notes/message.txt
checkout -b topic origin/main
checkout -- file.txt
switch -c topic --track
restore --staged --source HEAD~1 .
branch -vv --merged
branch --contains v1.0
branch -D old
tag -a v1.0 -m release
tag -l 'v*' --sort=-version:refname
fetch origin main --depth 1 --prune
fetch https://example.org/a.git +refs/heads/*:refs/remotes/o/*
pull --rebase --autostash origin main
push -u origin HEAD:refs/heads/topic --force-with-lease
push origin :gone
clone https://example.org/a.git sub --depth=1 -b main
clone git@example.org:a/b.git
clone ssh://git@example.org:22/a.git
clone vendored/repository.git
merge --no-ff -m join topic
merge -s ours topic
merge --strategy recursive -X theirs topic
rebase --onto main a b
rebase -i --autosquash main
reset --hard HEAD~1
stash
stash -u -m wip
stash push -- file
stash pop --index
stash show -p
stash list --format=%gd
remote -v
remote add up https://example.org/a.git
remote set-url origin https://example.org/b.git
remote get-url origin
rev-parse --verify --short HEAD
rev-list --count HEAD
ls-files -om --exclude-standard
ls-tree -r --name-only HEAD
ls-remote --heads origin
cat-file -p HEAD
show-ref --tags
for-each-ref --format='%(refname) %(objectname)' --sort=-creatordate
merge-base --is-ancestor a b
name-rev --tags HEAD
cherry -v main
blame -L 1,5 -w README.md
grep -n -e -O --and --not -e x -- src
grep -inC3 /api/v1
describe --tags --always --dirty
shortlog -sne HEAD
cherry-pick -x abc123
revert --no-edit HEAD
clean -xdf
mv a b
rm -r --cached build
init -b main
config user.name 'Ada Lovelace'
config --get user.email
config branch.main.remote
worktree add -b topic trees/topic
worktree list --porcelain
bisect start HEAD v1.0
bisect good
reflog -3
apply --check --3way fixes/one.patch
am -3 fixes/one.patch
format-patch --stdout HEAD~1
range-diff a...b
count-objects -vH
fsck --full
gc --auto
version
"""

REFUSED = """
-c alias.x=!evil x
-c core.fsmonitor=evil status
--config-env=core.pager=X log
-C /tmp status
--git-dir=/var/x status
--work-tree=/ status
--exec-path=/tmp status
-p log
--paginate log
git status
alias-or-typo
submodule foreach evil
submodule update --init
filter-branch --tree-filter evil
difftool -x evil
mergetool
archive --remote=x --exec=evil HEAD
daemon
var GIT_EDITOR
hook run pre-commit
send-email
credential fill
upload-pack .
update-index --index-info
hash-object /etc/passwd
interpret-trailers
instaweb
lfs pull
maintenance start
fetch --upload-pack evil origin
fetch --upload-pack=evil origin
fetch --upl evil origin
fetch --recurse-submodules
clone -u evil https://example.org/a
clone -uevil https://example.org/a
clone -qu evil https://example.org/a
clone --config core.sshCommand=evil https://example.org/a
clone -c core.sshCommand=evil https://example.org/a
clone --template=/var/t https://example.org/a
clone --reference /other https://example.org/a
clone --separate-git-dir=/var/x https://example.org/a
clone --recurse-submodules https://example.org/a
clone --bundle-uri=https://x https://example.org/a
clone 'ext::sh -c evil'
clone fd::7
clone evil://x
clone file:///etc
clone /other/project
clone ../other
clone https://example.org/a /mnt/elsewhere
clone https://example.org/a ../elsewhere
clone -- -oProxyCommand=evil:x
clone ssh://-oProxyCommand=evil/x
ls-remote --exec=evil .
ls-remote --upload-pa evil .
ls-remote evil::x
pull --upload-pack=evil
pull -S
push --receive-pack evil origin
push --exec=evil origin
push --exe=evil origin
push --rec=evil origin
push --signed origin
remote add x 'ext::evil'
remote add x file:///etc
remote set-url origin /other
remote frobnicate
rebase -x evil main
rebase -ix evil main
rebase -xevil main
rebase --exec=evil main
rebase --exec evil main
rebase --exe evil main
rebase --gpg-sign=x main
rebase -s evil main
bisect run evil
bisect visualize
bisect replay /mnt/log
bisect
bisect -- run
grep -Oevil x
grep -O x
grep -nO x
grep --open-files-in-pager=evil x
grep --open=evil x
grep --no-index root /etc/passwd
grep --textconv x
grep -f /etc/shadow
grep -f../x
grep --ext-grep x
diff --no-index /etc/passwd /dev/null
diff /etc/passwd /dev/null
diff -- /etc/passwd /dev/null
diff ../other/a b
diff --ext-diff
diff --textconv
diff --output=/var/x
diff --outp=x
diff -O/etc/passwd
diff --submodule=diff
log --output=/var/x
log --ext-diff -p
log --show-signature
log --format=%G?
log --pretty=tformat:%GK
for-each-ref --format=%(signature)
show --textconv HEAD:a
blame --contents /etc/passwd a
blame -S/var/x a
blame --ignore-revs-file=/etc/passwd a
blame --textconv a
commit -F /etc/passwd
commit -F../x -a
commit -aF/etc/passwd
commit --file=/etc/passwd
commit --fil=/etc/passwd
commit -t/etc/passwd
commit --template /etc/passwd
commit -S
commit --gpg-sign
commit -p
commit --interactive
commit --pathspec-from-file=/etc/passwd
commit -c HEAD
tag -F /etc/passwd x
tag -s x
tag -u key x
tag -v x
merge -s evil topic
merge --strategy=evil topic
merge -F/etc/passwd topic
merge -S topic
merge --verify-signatures topic
cherry-pick --strategy=evil x
cherry-pick -S x
revert --strategy evil x
add -p
add -i
add -e
add --pathspec-from-file=/etc/passwd
checkout -p
checkout --pathspec-from-file=x
checkout --recurse-submodules x
reset -p
stash push -p
stash --patch
stash frobnicate
clean -i
ls-files -X /etc/passwd
ls-files --exclude-from=/etc/passwd
ls-files --exclude-per-directory=../x
apply /etc/passwd
apply ../x.patch
apply --unsafe-paths x
apply --build-fake-ancestor=/var/x a
apply --directory=/etc x
am /mnt/mbox
am -i x
format-patch -o /tmp HEAD~1
format-patch --signature-file=/etc/passwd HEAD~1
init /var/x
init --template=/var/t
init --separate-git-dir=/var/x
worktree add /var/x
worktree add ../x
config core.sshCommand evil
config --global user.name x
config --file=/etc/x user.name y
config --list
config --edit
config --get-regexp .
config alias.x !evil
config --get http.extraheader
config --get user.name x
config
cat-file --textconv HEAD:a
cat-file --filters HEAD:a
shortlog --output=x
help log
status --help
log -m --end-of-options x
commit -m
log --quiet=yes
log --max-count --exec
"""


def rows(table: str) -> list[str]:
    return table.strip().splitlines()


@pytest.mark.parametrize("call", rows(ACCEPTED))
def test_it_is_allowed(call: str) -> None:
    assert check_args(shlex.split(call), {}) == []


@pytest.mark.parametrize("call", rows(REFUSED))
def test_it_is_refused(call: str) -> None:
    assert check_args(shlex.split(call), {}) != []


def test_the_tables_cover_the_allow_list() -> None:
    assert len(SUBCOMMANDS) >= 40
    assert {shlex.split(call)[0] for call in rows(ACCEPTED)} == SUBCOMMANDS


def test_a_fault_points_at_its_word_and_all_faults_come_together() -> None:
    args = ["commit", "-S", "-m", "x", "--template=/a", "a\0b"]
    faults = check_args(args, {"GIT_SSH_COMMAND": "evil", "A~/B": "fine", "LD_~/X": ""})
    assert [fault.pointer for fault in faults] == [
        "/env/GIT_SSH_COMMAND",
        "/env/LD_~0~1X",
        "/args/5",
        "/args/1",
        "/args/4",
    ]


def test_an_abbreviation_is_refused_with_the_full_name() -> None:
    (fault,) = check_args(["commit", "--amen"], {})
    assert fault.message == "git commit with --amen is not allowed; write --amend in full"


@pytest.mark.parametrize("args", [[], [""], ["-"], ["--"]])
def test_a_call_without_a_subcommand_is_refused(args: list[str]) -> None:
    assert len(check_args(args, {})) == 1
    with pytest.raises(ValueError, match="check_args"):
        git_argv(args)


@pytest.mark.parametrize(
    "name",
    [
        *("GIT_DIR", "GIT_SSH_COMMAND", "GIT_CONFIG_COUNT", "GIT_EXTERNAL_DIFF", "LD_PRELOAD"),
        *(
            "LD_LIBRARY_PATH",
            "PATH",
            "HOME",
            "SSH_ASKPASS",
            "EDITOR",
            "VISUAL",
            "PAGER",
            "LESSOPEN",
        ),
        *(
            "XDG_CONFIG_HOME",
            "BASH_ENV",
            "ENV",
            "PERL5OPT",
            "PYTHONSTARTUP",
            "GNUPGHOME",
            "LESSOPEN",
        ),
    ],
)
def test_this_variable_is_refused(name: str) -> None:
    (fault,) = check_args(["status"], {name: "x"})
    assert fault.pointer == f"/env/{name}"


@pytest.mark.parametrize("name", ["LANG", "LC_ALL", "TZ", "https_proxy", "GITHUB_TOKEN", "DEBUG"])
def test_this_variable_is_allowed(name: str) -> None:
    assert check_args(["status"], {name: "x"}) == []


def test_the_argv_puts_settings_in_front_and_switches_converters_off() -> None:
    argv = git_argv(["stash", "show", "-p"])
    assert argv[:4] == ("git", "--no-pager", "-c", "core.hooksPath=/dev/null")
    assert "protocol.ext.allow=never" in argv
    assert argv[-5:] == ("stash", "show", "--no-ext-diff", "--no-textconv", "-p")


# Against the real git. `mark` is a program that leaves a trace when it is run.


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    program = tmp_path / "mark"
    program.write_text(f'#!/bin/sh\necho ran >> "{tmp_path}/trace"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def git(tmp_path: Path) -> Git:
    """Runs git in a repository with two commits, under an empty home."""
    for folder in ("home", "bin"):
        (tmp_path / folder).mkdir()
    repository = tmp_path / "project"
    env = {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GIT_CONFIG_NOSYSTEM": "1",
    }

    def run(*args: str, argv: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv or ("git", *args),
            cwd=repository,
            env=env | (GIT_ENVIRONMENT if argv else {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    repository.mkdir()
    run("init", "-q", "-b", "main")
    run("config", "user.name", "Ada")
    run("config", "user.email", "ada@example.org")
    (repository / ".gitattributes").write_text("*.txt diff=text filter=text\n")
    (repository / "a.txt").write_text("one\n")
    run("add", ".")
    run("commit", "-qm", "one")
    run("branch", "side")
    (repository / "a.txt").write_text("two\n")
    run("commit", "-qam", "two")
    run("init", "-q", "--bare", "remote.git")
    return run


def was_run(tmp_path: Path) -> bool:
    trace = tmp_path / "trace"
    found = trace.exists()
    trace.unlink(missing_ok=True)
    return found


DANGEROUS = """
-c alias.x=!MARK x
-c core.fsmonitor=MARK status
fetch --upload-pack MARK remote.git
fetch --upl MARK remote.git
clone -u MARK remote.git copy
clone -qu MARK remote.git copy
clone --config core.sshCommand=MARK ssh://localhost/x copy
ls-remote --exec=MARK remote.git
ls-remote --upload-pa MARK remote.git
push --exec=MARK remote.git main
push --receive-pack MARK remote.git main
rebase -x MARK HEAD~1
rebase -fx MARK HEAD~1
rebase --exe MARK HEAD~1
grep -OMARK two
grep -nOMARK two
grep --open=MARK two
ls-remote mark::x
ls-remote mark://x
merge -s mark side~0 main~1 -m x --no-ff
archive --remote=remote.git --exec=MARK HEAD
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", rows(DANGEROUS))
def test_what_is_refused_really_runs_a_program(
    call: str, git: Git, mark: Path, tmp_path: Path
) -> None:
    for helper in ("git-remote-mark", "git-merge-mark"):
        (tmp_path / "bin" / helper).symlink_to(mark)
    if call.startswith("merge"):
        git("checkout", "-q", "side")
        git("commit", "-q", "--allow-empty", "-m", "three")
        call = "merge -s mark main -m x"
    args = shlex.split(call.replace("MARK", str(mark)))
    git(*args)
    assert was_run(tmp_path), "git runs nothing here: is the refusal needed?"
    assert check_args(args, {}) != []


READING = """
diff SECRET /dev/null
diff -- SECRET /dev/null
diff --no-index SECRET /dev/null
blame --contents SECRET a.txt
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", rows(READING))
def test_what_is_refused_really_reads_a_foreign_file(call: str, git: Git, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("do not read\n")
    args = shlex.split(call.replace("SECRET", str(secret)))
    assert "do not read" in git(*args).stdout
    assert check_args(args, {}) != []


def plant(git: Git, mark: Path, tmp_path: Path) -> None:
    """Everything a hostile configuration might hold that rdev switches off."""
    hooks = tmp_path / "project" / ".git" / "hooks"
    for hook in (
        *("pre-commit", "commit-msg", "prepare-commit-msg", "post-commit", "post-checkout"),
        *("pre-push", "post-merge", "pre-rebase", "post-rewrite", "post-index-change"),
        *("reference-transaction", "applypatch-msg", "pre-auto-gc", "pre-merge-commit"),
    ):
        (hooks / hook).unlink(missing_ok=True)
        (hooks / hook).symlink_to(mark)
    for key in (
        *("core.fsmonitor", "core.pager", "core.editor", "sequence.editor", "core.askPass"),
        *("diff.external", "diff.text.textconv", "diff.text.command", "interactive.diffFilter"),
    ):
        git("config", key, str(mark))
    git("config", "core.hooksPath", str(hooks))
    git("config", "alias.status", f"!{mark}")
    git("config", "pager.log", str(mark))
    git("config", "protocol.ext.allow", "always")
    git("config", "remote.evil.url", f"ext::{mark} %S")


GUARDED = """
status
log -p -1
log -S two
show HEAD
diff HEAD~1
blame a.txt
stash list -p
commit --allow-empty -m three
commit --allow-empty --amend
checkout -b topic
switch side
merge --no-ff main
rebase -i HEAD~1
push remote.git main
fetch evil
grep two
add .
tag -a v1 -m one
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", rows(GUARDED))
def test_a_planted_hook_or_setting_is_not_run(
    call: str, git: Git, mark: Path, tmp_path: Path
) -> None:
    plant(git, mark, tmp_path)
    was_run(tmp_path)
    args = shlex.split(call)
    assert check_args(args, {}) == []
    done = git(argv=git_argv(args))
    assert not was_run(tmp_path)
    assert done.returncode == (128 if call == "fetch evil" else 0), done.stderr


@pytest.mark.slow
def test_the_planted_settings_do_run_without_the_guard(
    git: Git, mark: Path, tmp_path: Path
) -> None:
    plant(git, mark, tmp_path)
    for args in (["status"], ["diff", "HEAD~1"], ["commit", "--allow-empty", "-m", "x"]):
        was_run(tmp_path)
        git(*args)
        assert was_run(tmp_path), args


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "call"),
    [
        ("filter.text.clean", "add a.txt"),
        ("core.sshCommand", "fetch ssh://localhost/x"),
        ("remote.origin.uploadpack", "fetch origin"),
        ("credential.helper", ""),
        ("gpg.program", "commit --allow-empty -m x"),
    ],
)
def test_the_page_names_what_is_not_guarded(
    key: str, call: str, git: Git, mark: Path, tmp_path: Path
) -> None:
    """The other half of docs/howto/git-guard.md; a guard that is added here belongs there too."""
    page = (Path(__file__).parents[2] / "docs" / "howto" / "git-guard.md").read_text()
    assert re.sub(r"\.(text|origin)\.", ".*.", key) in page
    if call:
        git("config", "remote.origin.url", "remote.git")
        git("config", "commit.gpgSign", "true" if key == "gpg.program" else "false")
        git("config", key, str(mark))
        (tmp_path / "project" / "a.txt").write_text("three\n")
        git(argv=git_argv(shlex.split(call)))
        assert was_run(tmp_path)


# The real git's own lists: an option that takes its value from the next word must say so here, or
# what follows is read wrongly (`commit -m -- --dry-run` is a dry run).


@pytest.fixture(scope="module")
def usage(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """What git says about itself, in an empty repository."""
    folder = tmp_path_factory.mktemp("usage")

    def ask(*args: str) -> str:
        env = {"HOME": str(folder), "PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1"}
        call = ("git", *args)
        done = subprocess.run(call, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    ask("init", "-q")
    return ask


# Not in those lists with their value, or with another meaning: read in git's source.
_OWN_READING = {("merge", "--file")}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_long_options_take_their_values_as_the_real_git_does(
    name: str, usage: Callable[..., str]
) -> None:
    words = usage(*name.split(), "--git-completion-helper-all").split()
    needs_value = {word[:-1] for word in words if word.endswith("=")}
    takes_none = {word for word in words if word.startswith("--") and not word.endswith("=")}
    for option, rule in RULES[name].options.items():
        if option in needs_value:
            assert rule.takes in ("=", "~"), option
        elif option in takes_none and (name, option) not in _OWN_READING:
            assert rule.takes != "=", option


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_short_options_take_their_values_as_the_real_git_does(
    name: str, usage: Callable[..., str]
) -> None:
    """`-m, --message <text>` in the usage text: a value; `-u[<mode>]`: an attached one; else none.

    Commands that share git's hand-written readers print no such lines for them.
    """
    for line in usage(*name.split(), "-h").splitlines():
        if (match := re.match(r"\s{4}(-[A-Za-z])(?:, (--[a-z-]+))?(.*)", line)) is None:
            continue
        short, long, rest = match.groups()
        option = RULES[name].options.get(short)
        if option is not None and (name, long) not in _OWN_READING:
            assert (option.takes in ("=", "~")) == bool(re.match(r" ?<", rest)), line
