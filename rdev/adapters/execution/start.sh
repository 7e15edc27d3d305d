# Becoming the command. First in the text, so that the process to be reads no more than this: Python
# puts `become` in front, the function with the command's secrets.

# proc_read PID: sets P_STATE P_PPID P_PGRP P_SESSION P_START; fails where there is no process.
# Its name stands in front of the last ")" and may hold anything, line feeds included.
proc_read() {
  P_LINE= P_START=
  while IFS= read -r P_PART; do P_LINE="$P_LINE$P_PART "; done 2>/dev/null <"/proc/$1/stat"
  [ -n "$P_LINE" ] || return 1
  set -- ${P_LINE##*) }
  P_STATE=$1 P_PPID=$2 P_PGRP=$3 P_SESSION=$4
  shift 19
  P_START=$1
}

# start TAG FOLDER HOME SUPERVISOR START INSTANCE: becomes the command. Alone in its session.
# The command's secrets are off the disk before it runs. What another starter has written is his
# until go/ is made: he may be the one who makes it.
start() {
  TAG=$1 D=$2
  proc_read $$ || exit 126
  LINE="$$ $P_START $4 $5 $6"
  exec </dev/null
  [ ! -e "$D/stdin.$TAG" ] || exec <"$D/stdin.$TAG"
  printf '%s\n' "$LINE" >"$D/pid.$$" || exit 126
  exec >>"$D/out"
  rm -f "$D/spec.$TAG" "$D/stdin.$TAG" 2>/dev/null &
  mkdir "$D/go" 2>/dev/null || { rm -f "$D/pid.$$" 2>/dev/null; exit 126; }
  printf '%s\n' "$LINE" >"$D/pid" 2>/dev/null || exit 126
  wait
  for FILE in "$D"/spec.* "$D"/stdin.*; do [ ! -e "$FILE" ] || rm -f "$FILE"; done 2>/dev/null
  exec 2>>"$D/err"
  umask 022
  cd "$3" && become
  exit 126
}

[ "$1" != start ] || "$@"
