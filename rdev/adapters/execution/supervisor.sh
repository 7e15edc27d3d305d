# The supervisor: what stays with a command in its project when rdev is gone. POSIX sh (dash,
# busybox, bash); one text with start.sh before and attach.sh behind it.
#
# The folder of a command's attempt ($D, the working directory of all of this; its name is the
# command's id, from the second attempt on with a dot and the number behind it) holds
#   spec.*   this text with the command's secrets, gone before the command runs
#   stdin.*  the command's standard input, open and gone before the command runs
#   pid.*    who is about to start: pid, start time (command), pid, start time (supervisor), instance
#   go/      the commit point: made by whoever starts the command or forbids the start
#   pid      the line of the one who made go/
#   out err  the journals
#   why      the end was asked for: reason, grace, pid and start time of who does it
#   kill     what was seen after the kill
#   ending   the command is over, its sizes are being measured
#   status   the outcome, by rename
#   bell     one byte more for each event that is not output
#   wake.*   the FIFO of an attach
#   made     the instance in which the folder was made, where that may be another than the attempt's
#
# Redirections that may fail stand on `printf`, never on `:`: a failed one on a special builtin
# ends the shell.

# alive PID START: a pid that was taken by another process, or a zombie, is not alive.
alive() {
  proc_read "$1" && [ "$P_START" = "$2" ] || return 1
  case $P_STATE in Z | X | x) return 1 ;; esac
}

# What the place is: its boot id and the start time of its pid 1.
read_instance() {
  I_BOOT=none
  read -r I_BOOT 2>/dev/null </proc/sys/kernel/random/boot_id
  proc_read 1
  INSTANCE=$I_BOOT:$P_START
}

# Sets NOW, centiseconds since boot.
read_clock() {
  read -r NOW _ </proc/uptime
  NOW=${NOW%.*}${NOW#*.}
  NOW=${NOW#0} NOW=${NOW#0}
  NOW=${NOW:-0}
}

nap() { sleep 0.05 2>/dev/null || sleep 1; }

is_number() { case $1 in '' | *[!0-9]*) return 1 ;; esac; }

# --- starting ---------------------------------------------------------------------------------

# launch SHELL ARG…: run this text as a detached process with no environment but PATH. A `&` would
# leave SIGINT ignored in all that follows. perl, where it is at hand, also makes the process adopt
# orphaned descendants (prctl 36, PR_SET_CHILD_SUBREAPER), so that a kill finds daemons too; else
# the first setsid leads a session, and so the second one forks and does not keep us waiting.
launch() {
  SETSID= PRCTL=
  [ ! -e /lib64/ld-linux-x86-64.so.2 ] || SETSID=112 PRCTL=157
  [ ! -e /lib/ld-linux-aarch64.so.1 ] || SETSID=157 PRCTL=167
  if [ -n "$PRCTL" ] && command -v perl >/dev/null; then
    perl -e 'exit if fork; syscall(shift); syscall(shift, 36, 1, 0, 0, 0);
      %ENV = (PATH => $ENV{PATH}); exec @ARGV' $SETSID $PRCTL "$@"
  else
    setsid setsid env -i PATH="$PATH" "$@"
  fi </dev/null >/dev/null 2>&1 3<&- 4>&-
}

# --- supervising ------------------------------------------------------------------------------

# supervise SHELL TAG FOLDER HOME INSTANCE TIMEOUT_S GRACE_S MAX_BYTES
supervise() {
  TAG=$2 D=$3
  umask 077
  cd "$D" || exit 1
  read_instance
  [ "$INSTANCE" = "$5" ] || { rm -f "spec.$TAG" "stdin.$TAG"; exit 0; }
  proc_read $$ || exit 1
  ME="$$ $P_START"
  read_clock
  BEGAN=$NOW
  watch "$6" "$7" "$8" &
  WATCHDOG=$!
  # The shell says on its standard error that a signal ended a child: the only portable way to
  # tell it from `exit 137`. So the journals are opened by the child itself.
  exec 2>"note.$TAG"
  setsid "$1" "spec.$TAG" start "$TAG" "$D" "$4" $ME "$INSTANCE"
  CODE=$?
  exec 2>/dev/null
  REFUSED=
  if read_pid && [ "$S $S_START" = "$ME" ]; then
    printf '' >ending
    conclude
    set -- spec.* stdin.* pid.* wake.*
  else
    REFUSED=yes
    set -- "spec.$TAG" "stdin.$TAG"
  fi
  kill "$WATCHDOG"
  rm -f "$@" "note.$TAG"
  # A kill was first: who waits for the start must not wait for the next heartbeat.
  [ -z "$REFUSED" ] || printf '.' >>bell
}

# Measure first, then say it: an attach that saw no `ending` has read sizes that are not larger.
conclude() {
  set -- $(stat -c %s out err)
  OUT=$1 ERR=$2 SIGNAL= NOTE= WHY= KILL= LATE=0
  read_clock
  RAN=$(((NOW - BEGAN) * 10))
  read -r NOTE <"note.$TAG"
  [ "$CODE" -le 128 ] || [ -z "$NOTE" ] || { SIGNAL=$((CODE - 128)) CODE=; }
  [ ! -e why ] || await_kill
  until publish || [ ! -e bell ]; do sleep 1; done
  printf '.' >>bell
}

# The kill goes on after the command's own death; its report is part of the status.
await_kill() {
  read -r WHY GRACE _ <why
  TURNS=$(((${GRACE:-5} + 6) * 20))
  while [ ! -e kill ] && [ $((TURNS -= 1)) -gt 0 ]; do nap; done
  read -r KILL <kill || KILL=unknown
  set -- $(stat -c %s out err)
  LATE=$(($1 + $2 - OUT - ERR))
}

# Fails on a full disk: tried again until there is room, or the folder was removed.
publish() {
  printf '%s\n' "code $CODE" "signal $SIGNAL" "why $WHY" "out_bytes $OUT" "err_bytes $ERR" \
    "late_bytes $LATE" "runtime_ms $RAN" "kill $KILL" end >status.new && mv -f status.new status
}

# --- ending -----------------------------------------------------------------------------------

# watch TIMEOUT_S GRACE_S MAX_BYTES: the timeout and the journals' limit, outside of the command's
# session and on its own when the supervisor is gone. Looks again when the limit could be reached
# at 256 MiB/s, at least every 5 s.
watch() {
  trap 'kill "$!"; exit 0' TERM
  read_clock
  DEADLINE=$((NOW + $1 * 100)) LARGEST=0
  while :; do
    read_clock
    LEFT=$((DEADLINE - NOW)) PAUSE=$((($3 - LARGEST) / 2684355))
    [ "$LEFT" -gt 0 ] || { reap timeout "$2"; exit 0; }
    [ "$PAUSE" -le 500 ] || PAUSE=500
    [ "$PAUSE" -ge 10 ] || PAUSE=10
    [ "$PAUSE" -le "$LEFT" ] || PAUSE=$LEFT
    sleep "$((PAUSE / 100)).$((PAUSE / 10 % 10))$((PAUSE % 10))" &
    wait "$!" || { sleep 1 & wait "$!"; }
    still_runs || exit 0
    set -- "$1" "$2" "$3" $(stat -c %s out err)
    LARGEST=$4
    [ "$5" -le "$LARGEST" ] || LARGEST=$5
    [ "$LARGEST" -le "$3" ] || { reap output_limit 1; exit 0; }
  done
}

still_runs() {
  [ -e bell ] || return 1
  read_pid || return 0
  alive "$S" "$S_START" || alive "$C" "$C_START"
}

# reap WHY GRACE_S: end the command and leave a report, once; a reaper that died is replaced.
reap() {
  read -r R_PID _ </proc/self/stat
  proc_read "$R_PID"
  R_LINE="$1 $2 $R_PID $P_START"
  set -C
  printf '%s\n' "$R_LINE" 2>/dev/null >why
  R_FIRST=$?
  set +C
  [ "$R_FIRST" = 0 ] ||
    { read -r _ _ R_PID R_START <why && alive "$R_PID" "$R_START" && return; }
  read_pid
  end_all "$2"
  printf '%s\n' "$REPORT" >kill.new && mv -f kill.new kill
}

# end_all GRACE_S: TERM, grace, KILL, look again; sets REPORT. At most GRACE_S + 3 s.
end_all() {
  read_clock
  DEADLINE=$((NOW + $1 * 100)) LAST=$((NOW + $1 * 100 + 200)) TERMED=' '
  scan
  while [ -n "$MEMBERS" ] && [ "$NOW" -lt "$DEADLINE" ]; do
    ask_to_end
    nap
    prune
    [ -n "$MEMBERS" ] || scan
    read_clock
  done
  scan
  while [ -n "$MEMBERS" ] && [ "$NOW" -lt "$LAST" ]; do
    for MEMBER in $MEMBERS; do kill -KILL "${MEMBER%:*}"; done
    nap
    scan
    read_clock
  done
  # A supervisor that was stopped (`kill -STOP $PPID`) would never say how it ended.
  ! alive "$S" "$S_START" || kill -CONT "$S"
  REPORT=confirmed
  [ -z "$MEMBERS" ] || REPORT=survivors
  for MEMBER in $MEMBERS; do REPORT="$REPORT ${MEMBER%:*}"; done
}

# TERM once for each; CONT, since a stopped process would not see it.
ask_to_end() {
  for MEMBER in $MEMBERS; do
    case $TERMED in *" $MEMBER "*) continue ;; esac
    TERMED="$TERMED$MEMBER "
    kill -TERM "${MEMBER%:*}"
    kill -CONT "${MEMBER%:*}"
  done
}

prune() {
  KEPT=
  for MEMBER in $MEMBERS; do
    ! alive "${MEMBER%:*}" "${MEMBER#*:}" || KEPT="$KEPT $MEMBER"
  done
  MEMBERS=$KEPT
}

# scan: sets MEMBERS ("pid:start …") to the living processes of the command: those that carry its
# marker, those of its session and process group, orphans its supervisor adopted, and all that
# descend from any of them. The supervisor's own helpers are those of the supervisor's session.
# A pid that was taken by another process says nothing: its session and children are others'.
scan() {
  FOUND=" " MEMBERS= TABLE= GROUP=$C ADOPTER=none MARKER=${D##*/}
  ! proc_read "$C" || [ "$P_START" = "$C_START" ] || GROUP=none
  ! alive "$S" "$S_START" || ADOPTER=$S
  for FILE in $(grep -l -F "RDEV_COMMAND_ID=${MARKER%%.*}" /proc/[0-9]*/environ 2>/dev/null); do
    FILE=${FILE#/proc/}
    FOUND="$FOUND${FILE%/environ} "
  done
  for FILE in /proc/[0-9]*; do
    proc_read "${FILE#/proc/}" || continue
    case $P_STATE in Z | X | x) continue ;; esac
    [ "$P_START" -lt "$C_START" ] ||
      TABLE="$TABLE ${FILE#/proc/} $P_START $P_PPID $P_PGRP $P_SESSION"
  done
  FOUND_BEFORE=
  until [ "$FOUND" = "$FOUND_BEFORE" ]; do
    FOUND_BEFORE=$FOUND MEMBERS=
    gather $TABLE
  done
}

# gather {PID START PPID PGRP SESSION}…: one pass over the table; FOUND grows, MEMBERS follow it.
gather() {
  while [ $# -ge 5 ]; do
    case $FOUND in
      *" $1 "*) MEMBERS="$MEMBERS $1:$2" ;;
      *) ! belongs "$3" "$4" "$5" || FOUND="$FOUND$1 " ;;
    esac
    shift 5
  done
}

# belongs PPID PGRP SESSION
belongs() {
  [ "$2" = "$GROUP" ] || [ "$3" = "$GROUP" ] || { [ "$1" = "$ADOPTER" ] && [ "$3" != "$S" ]; } ||
    case $FOUND in *" $1 "*) ;; *) return 1 ;; esac
}

# Sets C C_START S S_START from `pid`; nobody is called "none".
read_pid() {
  C= C_START= S= S_START= WHERE=
  read -r C C_START S S_START WHERE 2>/dev/null <pid
  [ -n "$WHERE" ] || { C=none C_START=0 S=none S_START=0; return 1; }
}
