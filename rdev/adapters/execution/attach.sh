# The attach protocol, project side: one exec starts the command if it may still be started, streams
# both journals and delivers the status. Frames on standard output, each headed by one line:
#   h                   attached: the command was started, or can never be
#   o OFFSET LENGTH     so many bytes of the journal `out`; `e` of `err`
#   k                   still here
#   s LENGTH            the status file; the last frame
#   l REASON [unfinished]  lost; the last frame
# Standard input carries the length of this text, the text, the command's stdin, and then line
# feeds as a heartbeat. Its end means that nobody listens any more: all of this goes away.
#
# Growth wakes us through fd 5, a FIFO of our own: whoever writes to it says "look again", and
# a blocked dd is what waits. GNU tail and inotifyd write to it by inotify; the floor is the
# heartbeat. `bell` is followed with the journals and never empty, so a tail that has taken its
# places says so with that byte: nothing that grows in between is missed.

umask 077
LC_ALL=C

# No word of ours on stderr. It stays open, as fd 4 and in this process alone: containerd takes the
# end of an exec's stderr, asked for or not, for a reason to end its stdin (containerd 1.6,
# pkg/cri/io/exec_io.go), and whoever held it longer would hold up the end of the exec.
hush() {
  exec 4>&2 2>/dev/null
}

# attach SHELL FOLDER HOME INSTANCE OUT ERR START STDIN_BYTES TIMEOUT_S GRACE_S MAX_BYTES
attach() {
  D=$2 WANTED=$4 AT_OUT=$5 AT_ERR=$6 HELLO= FIRST=yes LAUNCHED=
  hush
  exec 3<&0
  proc_read $$ && LEADER=$P_PGRP
  read_instance
  if [ "$INSTANCE" = "$4" ]; then
    [ -d "$D" ] || mkdir -p "$D"
  else
    make_anew
  fi
  cd "$D" || exit 1
  [ "$8" = 0 ] || receive_stdin "$8" || exit 1
  for FILE in out err; do printf '' >>"$FILE"; done
  [ -s bell ] || printf '.' >>bell
  if [ -d go ]; then
    rm -f "stdin.$$"
  elif [ "$7" = 1 ] && [ "$INSTANCE" = "$4" ]; then
    printf '%s\n' "$TEXT" >"spec.$$" || exit 1
    launch "$1" "$D/spec.$$" supervise "$1" "$$" "$D" "$3" "$4" "$9" "${10}" "${11}"
    LAUNCHED=yes
  else
    forbid
  fi
  observe
}

receive_stdin() {
  dd of="stdin.$$" bs="$1" count=1 iflag=fullblock
  [ "$(stat -c %s "stdin.$$")" = "$1" ] || { rm -f "stdin.$$"; return 1; }
}

# Never started is proven by making go/ first.
forbid() {
  mkdir go || return 0
  rm -f spec.* stdin.*
  is_original || lost pod_gone
  lost not_started
}

# A folder that is made anew, perhaps in another instance than its attempt's, says so from the first.
make_anew() {
  [ ! -d "$D" ] || return 0
  mkdir -p "$D.new.$$" && printf '%s\n' "$INSTANCE" >"$D.new.$$/made" && mv "$D.new.$$" "$D"
}

# Fails where the attempt's own folder went with its instance: what this one lacks proves nothing.
is_original() {
  MADE=$WANTED
  [ ! -e made ] || read -r MADE <made
  [ "$MADE" = "$WANTED" ]
}

# --- observing --------------------------------------------------------------------------------

observe() {
  WATCHER= LISTENER= MOVED=0
  read_clock
  BEGAN=$NOW
  [ -n "$LAUNCHED" ] || look
  [ -p "wake.$$" ] || mkfifo "wake.$$" || exit 1
  exec 5<>"wake.$$"
  # In a subshell, since a function that is redirected keeps a copy of our standard output open,
  # and then nobody sees us die. The same below.
  (listen) <&3 >&5 4>&- &
  LISTENER=$!
  choose_watcher
  start_watcher
  while :; do
    dd bs=65536 count=1 <&5 >/dev/null 4>&-
    MOVED=0
    look
    # A tail copies what it follows: after a burst a new one is cheaper than emptying the FIFO.
    [ "$MOVED" -lt 262144 ] || { kill "$WATCHER"; start_watcher; }
    [ "$MOVED" -gt 0 ] || { check; printf 'k\n' || quit; }
  done
}

# One look: sizes first, then `ending`. While that is absent the sizes in the status cannot become
# smaller than what was read here, so no byte beyond them is ever sent.
look() {
  [ -n "$HELLO" ] || [ ! -d go ] || { HELLO=yes; printf 'h\n' || quit; }
  ! read_status || finish
  set -- $(stat -c %s out err)
  [ "$AT_OUT" -le "$1" ] && [ "$AT_ERR" -le "$2" ] || truncated
  [ -e ending ] || { send o out "$AT_OUT" "$1"; AT_OUT=$1; send e err "$AT_ERR" "$2"; AT_ERR=$2; }
  FIRST=
}

finish() {
  if [ "$AT_OUT $AT_ERR" != "$END_OUT $END_ERR" ] || [ -n "$FIRST" ]; then
    set -- $(stat -c %s out err)
    [ "$END_OUT" -le "$1" ] && [ "$END_ERR" -le "$2" ] || truncated
    [ "$AT_OUT" -le "$END_OUT" ] && [ "$AT_ERR" -le "$END_ERR" ] || truncated
    send o out "$AT_OUT" "$END_OUT"
    send e err "$AT_ERR" "$END_ERR"
  fi
  printf 's %s\n%s' "${#STATUS}" "$STATUS"
  quit
}

# send LETTER FILE FROM TO
send() {
  [ "$3" -lt "$4" ] || return 0
  printf '%s %s %s\n' "$1" "$3" "$(($4 - $3))" || quit
  dd if="$2" bs=262144 skip="$3" count="$(($4 - $3))" \
    iflag=skip_bytes,count_bytes,fullblock || quit
  MOVED=$((MOVED + $4 - $3))
}

# Only what was shorter from the first is reported: later the last frame may have come out short.
# The reader attaches again.
truncated() {
  [ -z "$FIRST" ] || lost journal_truncated
  quit
}

# Sets STATUS, END_OUT, END_ERR. What is not whole is absent.
read_status() {
  STATUS= END_OUT= END_ERR= KEY=
  [ -e status ] || return 1
  while read -r KEY VALUE; do
    case $KEY in
      out_bytes) END_OUT=$VALUE ;;
      err_bytes) END_ERR=$VALUE ;;
    esac
    STATUS="$STATUS$KEY $VALUE
"
    [ "$KEY" != end ] || break
  done <status
  [ "$KEY" = end ] && is_number "$END_OUT" && is_number "$END_ERR"
}

# Nothing grew: is there still someone who could end it? Who died may have ended it just before.
check() {
  kill -0 "$WATCHER" || { WATCH_BY=poll; start_watcher; }
  if [ ! -d go ]; then
    read_clock
    [ $((NOW - BEGAN)) -lt 1000 ] || quit
  elif read_pid; then
    [ "$WHERE" != "$INSTANCE" ] || { ! alive "$S" "$S_START" && ! alive "$C" "$C_START"; } || return 0
    read_status || lost supervisor_gone
  else
    check_starters
  fi
}

# go/ was made and `pid` is not written: by a starter that lives, that died, or by a refusal.
check_starters() {
  STARTER=not_started
  is_original || STARTER=pod_gone
  for FILE in pid.*; do
    [ -e "$FILE" ] || continue
    STARTER=supervisor_gone
    read -r C C_START S S_START _ <"$FILE"
    ! alive "$C" "$C_START" && ! alive "$S" "$S_START" || return 0
  done
  read_pid || lost "$STARTER"
}

lost() {
  [ -n "$HELLO" ] || printf 'h\n'
  LOST="l $1"
  ! is_unfinished || LOST="$LOST unfinished"
  printf '%s\n' "$LOST"
  quit
}

# Whether the attempt's processes went with its instance, and nothing says that it ended before, or
# was being ended. go/ is there by now: it can never start any more.
is_unfinished() {
  [ "$INSTANCE" != "$WANTED" ] && [ ! -e status ] && [ ! -e ending ] && [ ! -e why ] &&
    { ! read_pid || [ "$WHERE" != "$INSTANCE" ]; }
}

quit() {
  kill -KILL $WATCHER $LISTENER
  exit 0
}

# Heartbeats become wake-ups. At the end of the stream the whole group goes, also a dd that is
# blocked on a reader that is gone; the supervisor is in a session of its own.
listen() {
  while read -r _; do printf '.'; done
  [ "$LEADER" != $$ ] || kill -KILL "-$$"
  kill -KILL $$
  printf '.'
}

# --- noticing growth --------------------------------------------------------------------------

choose_watcher() {
  if command -v inotifyd >/dev/null; then
    WATCH_BY=inotifyd
    # inotifyd does not say when it is ready: look a few times more at the beginning.
    (for PAUSE in 0.01 0.03 0.1 0.3 1; do sleep $PAUSE; printf '.'; done) >&5 4>&- &
  elif tail --version >/dev/null </dev/null; then
    WATCH_BY=tail
  else
    WATCH_BY=poll
  fi
}

start_watcher() {
  (watch_by_$WATCH_BY) </dev/null >&5 3<&- 4>&- &
  WATCHER=$!
}

watch_by_inotifyd() { exec inotifyd - out:c err:c bell:c; }

# The interval holds where the file system has no inotify.
watch_by_tail() { exec tail -q -f -c 1 -s 0.05 out err bell; }

watch_by_poll() {
  SIZES= TURN=0
  while :; do
    SIZES_NOW=$(stat -c %s out err bell)
    [ "$SIZES_NOW" = "$SIZES" ] || { SIZES=$SIZES_NOW TURN=0; printf '.'; }
    if [ $((TURN += 1)) -le 25 ]; then sleep 0.01; else sleep 0.2; fi || sleep 1
  done
}

# --- other verbs ------------------------------------------------------------------------------

# kill_command SHELL FOLDER GRACE_S: answers with what was seen. Goes on when its caller goes.
kill_command() {
  D=$2
  hush
  read_instance
  make_anew
  cd "$D" || exit 1
  if mkdir go; then
    rm -f spec.* stdin.*
    answer confirmed
  fi
  [ -d go ] || exit 1
  await_pid || answer confirmed
  [ "$WHERE" = "$INSTANCE" ] || answer confirmed # nobody outlives an instance
  if [ -e kill ] || read_status; then
    end_all "$3"
    answer "$REPORT"
  fi
  printf '%s\n' "$TEXT" >"reap.$$" || { reap cancelled "$3"; answer "$REPORT"; } # a full disk
  launch "$1" "$D/reap.$$" reap_detached "$D" cancelled "$3"
  TURNS=$((($3 + 4) * 20))
  until [ -e kill ]; do
    [ $((TURNS -= 1)) -gt 0 ] || exit 1
    nap
  done
  read -r REPORT <kill
  answer "$REPORT"
}

# Fails where go/ was made to forbid the start. A starter that died before it wrote its pid
# never became the command.
await_pid() {
  until read_pid; do
    STARTING=
    for FILE in pid.*; do
      read -r C C_START _ <"$FILE" && alive "$C" "$C_START" && STARTING=yes
    done
    [ -n "$STARTING" ] || { read_pid; return; }
    nap
  done
}

# reap_detached FOLDER WHY GRACE_S
reap_detached() {
  D=$1
  cd "$D" || exit 1
  rm -f "${0##*/}"
  reap "$2" "$3"
}

# prepare HOME COMMANDS: make the folders and say what is missing here.
prepare() {
  for TOOL in dd env grep mkdir mkfifo mv rm setsid sleep stat tail; do
    command -v $TOOL >/dev/null || answer "missing $TOOL"
  done
  [ -r /proc/self/stat ] || answer "missing /proc"
  (umask 022 && mkdir -p "$1") 2>/dev/null && mkdir -p "$2" 2>/dev/null || answer "missing room"
  answer ready
}

# instance HOME
instance() {
  [ -d "$1" ] || answer absent
  read_instance
  answer "$INSTANCE"
}

# tidy COMMANDS: reads names of folders, up to an empty line. Of each only go/ stays: its command can
# never start any more. Answers with those that still run, which are left as they are.
tidy() {
  hush
  read_instance
  RUNNING=
  while read -r NAME && [ -n "$NAME" ]; do
    cd "$1/$NAME" || continue
    if [ ! -d go ]; then
      mkdir go || continue
    elif read_pid && [ "$WHERE" = "$INSTANCE" ] &&
      { alive "$S" "$S_START" || alive "$C" "$C_START"; }; then
      RUNNING="$RUNNING $NAME"
      continue
    fi
    for FILE in * .[!.]*; do
      [ "$FILE" = go ] || set -- "$@" "$1/$NAME/$FILE"
    done
    if [ $# -gt 500 ]; then
      discard "$@"
      set -- "$1"
    fi
  done
  discard "$@"
  answer "tidied$RUNNING"
}

# remove COMMANDS: reads names of folders, up to an empty line; all of them go.
remove() {
  hush
  while read -r NAME && [ -n "$NAME" ]; do
    set -- "$@" "$1/$NAME"
    if [ $# -gt 500 ]; then
      discard "$@" || exit 1
      set -- "$1"
    fi
  done
  discard "$@" && answer removed
}

# discard KEPT FILE…
discard() {
  shift
  [ $# -eq 0 ] || rm -rf "$@"
}

answer() {
  printf '= %s\n' "$1"
  exit 0
}
