# shellcheck shell=bash
# shellcheck disable=SC2034  # own, argument, lost and patience are read by the scripts
# Sourced by every script here: command line, settings, gcloud, and the state of slice and run.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
me=tpu/$(basename "$0")
lost='^(PREEMPTED|TERMINATED|STOPPED|SUSPENDED|FAILED|LOST)$' # states no slice comes back from
patience=10                                                   # unanswered questions in a row
exec 3>&1                                                     # a dry run's lines, from inside $(…) too

say() { printf '%s: %s\n' "$me" "$*" >&2; }
fail() {
  say "$1"
  exit "${2:-1}"
}

# parse FLAG DEFAULT ARG…: --help, --dry-run, the script's own FLAG ("" for none), and one
# argument where DEFAULT is not "". Sets dry_run, own and argument, then reads the settings.
parse() {
  local flag=$1 default=$2
  shift 2
  dry_run="" own="" argument=$default
  while (($#)); do
    case $1 in
      --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --dry-run) dry_run=yes ;;
      -*)
        [[ $1 == "$flag" ]] || fail "No such option: $1. See $me --help." 2
        own=yes
        ;;
      *)
        [[ $default && $argument == "$default" ]] || fail "One argument too many: $1. See $me --help." 2
        argument=$1
        ;;
    esac
    shift
  done
  read_settings
  [[ $dry_run ]] || type -P gcloud >/dev/null ||
    fail "gcloud must be on PATH: install the Google Cloud CLI, or add --dry-run." 2
}

read_settings() {
  local file=${EJAX_TPU_ENV:-$here/env} field
  # Only the file counts: a NAME or ZONE of the calling shell is not meant.
  unset PROJECT ZONE NAME ACCELERATOR RUNTIME SPOT REPOSITORY COMMIT CONFIG WORKDIR FIELDS \
    MAX_RECREATIONS POLL_SECONDS SERVICE_ACCOUNT NETWORK
  [[ -f $file ]] ||
    fail "No such file: $file. Copy tpu/env.example to tpu/env and fill it in, or let EJAX_TPU_ENV name yours." 2
  # shellcheck source=env.example
  source "$file" || fail "$file must be shell assignments, NAME=value, as in tpu/env.example." 2

  must PROJECT '^([a-z0-9.-]+:)?[a-z][a-z0-9-]+$' "the id of a Google Cloud project"
  must ZONE '^[a-z]+-[a-z]+[0-9]+-[a-z]$' "a zone, such as us-west4-a"
  must NAME '^[a-z][a-z0-9-]*$' "a name of a-z, 0-9 and -"
  must ACCELERATOR '^(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]*$' \
    "an accelerator type, such as v4-128, v5litepod-8 (v5e), v5p-8 or v6e-8"
  must SPOT '^(yes|no)$' "yes or no"
  must REPOSITORY '^(https|ssh|file)://[^[:space:]]+$' "a URL that git clones, https://…"
  must COMMIT '^[0-9a-f]{7,40}$' "a commit, 7 to 40 hex digits (git rev-parse HEAD)"
  must CONFIG '^[A-Za-z0-9_./-]+[.]py(:[A-Za-z0-9_]+)?$' "a config of the repository, configs/NAME.py, or one of its variants, configs/NAME.py:mnli_pod"
  must WORKDIR '^(gs:/)?/[A-Za-z0-9_./=-]+$' \
    "gs://BUCKET/FOLDER, or the absolute path of a folder that all workers share"
  must MAX_RECREATIONS '^[0-9]+$' "a whole number"
  must POLL_SECONDS '^[0-9]+([.][0-9]+)?$' "a number of seconds"
  must SERVICE_ACCOUNT '^$|^[^[:space:]@]+@[^[:space:]@]+$' "an e-mail address, or empty"
  must NETWORK '^[A-Za-z0-9/_.-]*$' "a network, or empty"
  [[ -z ${FIELDS+set} || $(declare -p FIELDS) == "declare -a"* ]] ||
    fail "FIELDS must be an array, (learning_rate=5e-5 epochs=3). Got '$FIELDS'. Correct it in $file." 2
  for field in ${FIELDS[@]+"${FIELDS[@]}"}; do
    [[ $field =~ ^(--smoke|[a-z_.]+=.*)$ ]] ||
      fail "FIELDS must hold field=value or --smoke. Got '$field'. Correct it in $file." 2
  done
  case $ACCELERATOR in
    v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
    v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
    v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    *) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
  esac
}

# must NAME PATTERN WHAT: the setting, unset or not, fits the pattern.
must() {
  [[ ${!1-} =~ $2 ]] || fail "$1 must be $3. Got '${!1-}'. Set it in ${EJAX_TPU_ENV:-$here/env}." 2
}

gcloud() {
  if [[ $dry_run ]]; then
    { printf 'gcloud' && printf ' %q' "$@" && printf '\n'; } >&3
  else
    command gcloud "$@" </dev/null 3>&-
  fi
}

tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE" --quiet; }

delete_slice() { tpus queued-resources delete "$NAME" --force; }

# on_workers WORKER FUNCTION ARG…: calls a bash function of ours over there, in the home folder.
on_workers() {
  local worker=$1
  shift
  tpus tpu-vm ssh "$NAME" --worker="$worker" --command="$(declare -f "$1"); $(printf '%q ' "$@")"
}

# One word: READY; MISSING without a request; LOST for a request whose machine is gone; UNKNOWN
# when gcloud has no answer, which is no reason to delete anything; else Google's own word.
slice_state() {
  local word
  word=$(describe queued-resources 'value(state.state)')
  if [[ $word == ACTIVE || $dry_run ]]; then
    word=$(describe tpu-vm 'value(state)')
    [[ $word != MISSING ]] || word=LOST
  fi
  echo "$word"
}

describe() {
  local said
  if said=$(tpus "$1" describe "$NAME" --format="$2" 2>&1); then
    grep -Ex '[A-Z_]+' <<<"$said" || echo UNKNOWN # warnings are more than a word
  elif [[ $said == *NOT_FOUND* ]]; then
    echo MISSING
  else
    say "$said"
    echo UNKNOWN
  fi
}

# One word: running, its exit code, none (never started, or lost by a reboot), or UNKNOWN.
run_state() {
  local said
  said=$(on_workers 0 report_run 2>&1) || { say "$said" && said=run=UNKNOWN; }
  sed -n 's/^run=//p' <<<"$said"
}

report_run() {
  if ! cd ~/ejax-run 2>/dev/null; then
    echo run=none
  elif ! flock -n lock true; then # held as long as the run lives
    echo run=running
  elif [[ -s exit ]]; then
    echo "run=$(cat exit)"
  else
    echo run=none
  fi
}
