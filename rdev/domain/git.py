"""Which git calls a client may make, and the argv they become.

Owns how a call is read, what an option's value and an operand may be, and the settings that rdev
puts in front. What is not in the table of `git_options.py` is refused, so an abbreviation or an
option of a newer git is refused too. It guards against mistakes, not against a hostile repository:
docs/howto/git-guard.md.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from rdev.domain.errors import Fault
from rdev.domain.git_options import RULES, SUBCOMMANDS, Option, Rule

# Added to the environment of every git command.
GIT_ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "",  # set and empty: core.askPass and SSH_ASKPASS are not looked at
        "GIT_EDITOR": ":",
        "GIT_SEQUENCE_EDITOR": ":",
        "GIT_MERGE_AUTOEDIT": "no",
        "GIT_PAGER": "cat",
    }
)

# In front of the sub-command; the command line outranks every configuration file.
_SETTINGS = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "protocol.allow=never",
    "protocol.ext.allow=never",
    "protocol.file.allow=user",
    "protocol.git.allow=always",
    "protocol.http.allow=always",
    "protocol.https.allow=always",
    "protocol.ssh.allow=always",
    "submodule.recurse=false",
    "fetch.recurseSubmodules=false",
    "log.showSignature=false",
    # A housekeeping process in the background would outlive the command and hold its output open.
    "gc.autoDetach=false",
    "maintenance.autoDetach=false",
)
# Without these a configured diff or text converter is run.
_NO_CONVERTERS = ("--no-ext-diff", "--no-textconv")
_BEHIND_SUBCOMMAND = {
    "diff": _NO_CONVERTERS,
    "log": _NO_CONVERTERS,
    "show": _NO_CONVERTERS,
    "reflog": _NO_CONVERTERS,
    "reflog show": _NO_CONVERTERS,
    "stash list": _NO_CONVERTERS,
    "stash show": _NO_CONVERTERS,
    "blame": ("--no-textconv",),
}

# Of the environment a client may set. Each of these makes git, or what git starts, run or read
# something else.
_ENV_PREFIXES = ("GIT_", "LD_", "DYLD_", "SSH_", "XDG_", "GPG_", "PERL", "PYTHON", "BASH_")
_ENV_NAMES = frozenset(
    (
        *("PATH", "HOME", "SHELL", "IFS", "ENV", "CDPATH", "SHELLOPTS", "BASHOPTS", "PS4"),
        *(
            "EDITOR",
            "VISUAL",
            "PAGER",
            "LESS",
            "LESSOPEN",
            "LESSCLOSE",
            "LESSKEY",
            "LESSEDIT",
            "LV",
            "BROWSER",
        ),
        *("GNUPGHOME", "CURL_HOME", "NETRC", "TMPDIR"),
        *("GCONV_PATH", "LOCPATH", "NLSPATH", "OPENSSL_CONF", "OPENSSL_MODULES", "OPENSSL_ENGINES"),
        *("NODE_OPTIONS", "RUBYOPT", "RUBYLIB"),
    )
)

# `config` discloses tokens and changes what git runs: these keys alone, and two may be set.
_CONFIG_READ = re.compile(
    r"(user\.(name|email)|init\.defaultbranch|core\.(bare|filemode|autocrlf|eol|ignorecase)"
    r"|branch\..+\.(remote|merge|rebase)|pull\.(rebase|ff)|push\.default)",
    re.IGNORECASE,
)
_CONFIG_WRITE = re.compile(r"user\.(name|email)", re.IGNORECASE)
# Another strategy X runs a program git-merge-X.
_STRATEGIES = frozenset(("ort", "recursive", "resolve", "octopus", "ours", "subtree"))
_SCHEME = re.compile(r"([A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_SCHEMES = frozenset(("https", "http", "ssh", "git"))
_NUMBER = re.compile(r"-\d+")


def may_be_set(name: str) -> bool:
    """Whether a client may set this variable for a git command."""
    return not name.startswith(_ENV_PREFIXES) and name not in _ENV_NAMES


def check_args(args: Sequence[str], env: Mapping[str, str]) -> list[Fault]:
    """Everything that rdev refuses about a git call; empty when `git_argv` may be run.

    `args` is what stands behind `git`; pointers are into `/args` and `/env`.
    """
    faults = [
        Fault(pointer=f"/env/{_escaped(name)}", message="cannot be set for a git command")
        for name in env
        if not may_be_set(name)
    ]
    faults += [
        Fault(pointer=f"/args/{i}", message="must not hold a NUL character")
        for i, word in enumerate(args)
        if "\0" in word
    ]
    if isinstance(rule := _rule_of(args), Fault):
        return [*faults, rule]
    call = _Call(rule, args)
    call.read()
    return faults + call.faults


def git_argv(args: Sequence[str]) -> tuple[str, ...]:
    """The argv of a call that passed `check_args`; run it with `GIT_ENVIRONMENT`.

    No pager, no hooks, no file system monitor, no transport that is a program, no configured diff
    or text converter where the output is a diff. Errors: ValueError for another call.
    """
    rule = _rule_of(args)
    if isinstance(rule, Fault):
        raise ValueError(f"not a call that passed check_args: {rule.message}")
    settings = [word for setting in _SETTINGS for word in ("-c", setting)]
    return (
        *("git", "--no-pager", *settings, *args[: rule.words]),
        *_BEHIND_SUBCOMMAND.get(rule.name, ()),
        *args[rule.words :],
    )


def _rule_of(args: Sequence[str]) -> Rule | Fault:
    if not args:
        return Fault(pointer="/args", message="must name a sub-command")
    if args[0] not in SUBCOMMANDS:
        if args[0] == "git":
            return Fault(pointer="/args/0", message="leave out `git`: begin with the sub-command")
        what = "an option in front of the sub-command" if args[0][:1] == "-" else "this sub-command"
        return Fault(pointer="/args/0", message=f"{what} is not allowed")
    if (rule := RULES.get(" ".join(args[:2]))) is not None and len(args) > 1:
        return rule
    if (rule := RULES.get(args[0])) is not None:
        return rule
    pointer = "/args/1" if len(args) > 1 else "/args"
    return Fault(pointer=pointer, message=f"this action of {args[0]} is not allowed")


class _Call:
    """Reads one call word by word, as git does, and collects what is wrong with it."""

    def __init__(self, rule: Rule, args: Sequence[str]) -> None:
        self.faults: list[Fault] = []
        self._rule = rule
        self._args = args
        self._next = rule.words
        self._options: list[str] = []
        self._operands: list[str] = []

    def read(self) -> None:
        """Every word: options until `--`, all else operands."""
        only_operands = False
        while self._next < len(self._args):
            word, self._next = self._args[self._next], self._next + 1
            if only_operands or len(word) < 2 or word[0] != "-":
                self._operand(word, named=not only_operands)
            elif word == "--":
                only_operands = True
            elif word.startswith("--"):
                self._long(word)
            else:
                self._short(word)
        if self._rule.name == "config":
            self._config()

    def _refuse(self, message: str) -> None:
        self.faults.append(Fault(pointer=f"/args/{self._next - 1}", message=message))

    def _long(self, word: str) -> None:
        name, equals, value = word.partition("=")
        option = self._rule.options.get(name)
        if option is None:
            full = [known for known in self._rule.options if known.startswith(name)]
            hint = f"; write {' or '.join(full[:3])} in full" if full and len(name) > 3 else ""
            self._refuse(f"git {self._rule.name} with {name} is not allowed{hint}")
        elif equals and not option.takes:
            self._refuse(f"{name} takes no value")
        elif equals:
            self._value(name, option, value)
        else:
            self._next_value(name, option)
        self._options.append(name)

    def _short(self, word: str) -> None:
        """A cluster such as -am: flags, and at most one option with a value at its end."""
        if "-#" in self._rule.options and _NUMBER.fullmatch(word):
            return
        for i, letter in enumerate(word[1:], start=2):
            option = self._rule.options.get(f"-{letter}")
            if option is None:
                self._refuse(f"git {self._rule.name} with -{letter} is not allowed")
                return
            if option.takes:
                if i < len(word):
                    self._value(f"-{letter}", option, word[i:])
                else:
                    self._next_value(f"-{letter}", option)
                return

    def _next_value(self, name: str, option: Option) -> None:
        """The value that is a word of its own, where the option takes one.

        A value that looks like an option is refused: if git took it for one after all, what
        follows would be read wrongly.
        """
        if option.takes not in ("=", "~"):
            return
        if self._next >= len(self._args):
            if option.takes == "=":
                self._refuse(f"{name} needs a value")
            return
        value, self._next = self._args[self._next], self._next + 1
        if value.startswith("-") and len(value) > 1 and option.kind != "TEXT":
            self._refuse(f"{name} needs a value; one that begins with a dash is to be attached")
        else:
            self._value(name, option, value)

    def _value(self, name: str, option: Option, value: str) -> None:
        if option.kind == "PATH" and not _is_inside(value):
            self._refuse(f"{name} must be a path inside the project")
        elif option.kind == "STRATEGY" and value not in _STRATEGIES:
            self._refuse(f"{name} must be one of {', '.join(sorted(_STRATEGIES))}")
        elif option.kind == "FORMAT" and ("%G" in value or "signature" in value):
            self._refuse(f"{name} must not ask for signatures: that runs gpg")

    def _operand(self, word: str, *, named: bool) -> None:
        if named and self._rule.has_actions and word != "-":
            self._refuse(f"this action of {self._rule.name} is not allowed")
        check = _OPERANDS.get(self._rule.name.split()[0])
        if check is not None and (fault := check(word)) is not None:
            self._refuse(fault)
        self._operands.append(word)

    def _config(self) -> None:
        """`config NAME`, `config --get NAME` and `config user.name VALUE`, nothing else."""
        names = _CONFIG_READ
        if len(self._operands) == 2 and not {"--get", "--get-all"} & set(self._options):
            names = _CONFIG_WRITE
        elif len(self._operands) != 1:
            self._refuse("config takes one key, and a value only to set user.name or user.email")
            return
        if not names.fullmatch(self._operands[0]):
            self._refuse(f"the key {self._operands[0]} is not allowed")


def _is_inside(path: str) -> bool:
    """Whether the text of a path stays in the folder it starts from. Links are not followed."""
    return path != "" and path[0] not in "/~" and ".." not in path.split("/")


def _local(word: str) -> str | None:
    """git reads such an operand from the file system, wherever it lies."""
    return None if _is_inside(word) else "must be a path inside the project"


def _remote(word: str) -> str | None:
    """A remote's name, a refspec, a path inside the project, or an address git itself fetches.

    `X::…` and an unknown scheme run a program git-remote-X.
    """
    if word.startswith("-"):
        return "must not begin with a dash"
    if "::" in word:
        return "a transport that is a program is not allowed"
    if (url := _SCHEME.match(word)) is not None:
        if url[1].lower() not in _SCHEMES:
            return f"must be one of {', '.join(sorted(_SCHEMES))}"
        return "the host must not begin with a dash" if url[2].startswith("-") else None
    if ":" in word.split("/")[0]:
        return None  # user@host:path, or a refspec
    return _local(word)


_OPERANDS: Mapping[str, Callable[[str], str | None]] = {
    "diff": _local,
    "init": _local,
    "worktree": _local,
    "apply": _local,
    "am": _local,
    "clone": _remote,
    "fetch": _remote,
    "pull": _remote,
    "push": _remote,
    "remote": _remote,
    "ls-remote": _remote,
}


def _escaped(name: str) -> str:
    """One reference token of a JSON pointer. Source: RFC 6901, section 3."""
    return name.replace("~", "~0").replace("/", "~1")
