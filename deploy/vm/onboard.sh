#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Joins this machine to the mesh: installs mesh-agent and Envoy, starts them,
# and lets the machine call mesh services and be called as one.
#
# Everything is in functions that the last line calls, so a download that was
# cut short does nothing. Nothing is believed that is not covered by the pinned
# root certificate: --ca-sha256 is the SHA-256 of its DER form. The token is
# read from the terminal or from a file, never from the command line, which
# every user of the machine can see.
set -eu
umask 077

CONF=/etc/isthmus
STATE=/var/lib/isthmus
BIN=/usr/local/bin
SBIN=/usr/local/sbin
UNIT=/etc/systemd/system/mesh-agent.service
RUN=/run/isthmus
LOG=/var/log/mesh-agent.log
MANIFEST=$STATE/manifest
PORTS="15000 15001 15006 15020 15021 15053 15090"

usage() {
	cat <<'TEXT'
usage: mesh-onboard.sh --server HOST:PORT --name NAME --ca-sha256 HEX [options]
       mesh-onboard.sh --check --server HOST:PORT --name NAME --ca-sha256 HEX [options]
       mesh-onboard.sh --uninstall [--dry-run]

  --server HOST:PORT   where meshd serves onboarding (HTTPS)
  --name NAME          the name under which this machine was registered
  --ca-sha256 HEX      fingerprint of the mesh's root certificate (DER, SHA-256)
  --ca FILE            the root certificate; fetched and compared if absent
  --token-file FILE    the token; asked for if absent. It is not needed once joined,
                       until the certificate ends while the machine is away
  --envoy PATH         use this Envoy instead of fetching one
  --no-capture         do not touch the machine's traffic (no nftables)
  --check              only tell whether this machine can join
  --dry-run            tell what would be changed, change nothing
  --uninstall          undo everything that an earlier run changed
TEXT
}

say() { printf '%s\n' "$*"; }
ok() { printf '  ok    %s\n' "$*"; }
warn() { printf '  warn  %s\n' "$*"; }
bad() {
	printf '  FAIL  %s\n' "$*"
	failures=$((failures + 1))
}
die() {
	printf 'mesh-onboard: %s\n' "$*" >&2
	exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
systemd() { [ -d /run/systemd/system ] && have systemctl; }

options() {
	server='' name='' pin='' ca='' token_file='' envoy='' capture=true
	mode=install dry=false failures=0 changed=false
	while [ $# -gt 0 ]; do
		case $1 in
		--server | --name | --ca-sha256 | --ca | --token-file | --envoy)
			[ $# -ge 2 ] || die "$1 needs a value"
			case $1 in
			--server) server=$2 ;;
			--name) name=$2 ;;
			--ca-sha256) pin=$(printf '%s' "$2" | tr 'A-F' 'a-f' | tr -d ':') ;;
			--ca) ca=$2 ;;
			--token-file) token_file=$2 ;;
			--envoy) envoy=$2 ;;
			esac
			shift
			;;
		--no-capture) capture=false ;;
		--check) mode=check ;;
		--dry-run) dry=true ;;
		--uninstall) mode=uninstall ;;
		-h | --help)
			usage
			exit 0
			;;
		*) die "unknown option $1 (--help lists them)" ;;
		esac
		shift
	done
	[ "$mode" = uninstall ] && return
	case $server in *:*) ;; *) die "--server '$server': want HOST:PORT" ;; esac
	case $name in '' | *[!a-z0-9.-]*) die "--name '$name': want lower-case letters, digits, dots and dashes" ;; esac
	case $pin in *[!0-9a-f]*) die "--ca-sha256: want 64 hexadecimal digits" ;; esac
	[ ${#pin} -eq 64 ] || die "--ca-sha256: want 64 hexadecimal digits"
	[ -z "$token_file" ] || [ -r "$token_file" ] || die "--token-file $token_file cannot be read"
	[ -z "$envoy" ] || [ -x "$envoy" ] || die "--envoy $envoy cannot be run"
}

# --- fetching -----------------------------------------------------------------

# get PATH FILE fetches over TLS verified against the pinned root alone.
get() {
	if have curl; then
		curl -fsS --proto '=https' --connect-timeout 10 --cacert "$work/root.pem" -R -o "$2" "https://$server$1"
	else
		wget -q --https-only --timeout=30 --ca-certificate="$work/root.pem" -O "$2" "https://$server$1"
	fi
}

# get_newer PATH FILE INSTALLED fetches unless what is installed is as new.
get_newer() {
	if have curl && [ -f "$3" ] && recorded "$3"; then
		curl -fsS --proto '=https' --connect-timeout 10 --cacert "$work/root.pem" -R -z "$3" -o "$2" "https://$server$1" || return 1
		[ -s "$2" ] || cp -p "$3" "$2"
	else
		get "$1" "$2"
	fi
}

# pick_root FILE prints the one certificate of FILE that has the pinned
# fingerprint. Others that a server may have put beside it are not believed.
pick_root() {
	rm -f "$work"/cert.*
	awk -v to="$work/cert." '/-----BEGIN CERTIFICATE-----/ {n++; on = 1}
		on {print > (to n)}
		/-----END CERTIFICATE-----/ {on = 0}' "$1"
	for one in "$work"/cert.*; do
		[ -f "$one" ] || continue
		got=$(sed '/-----/d' "$one" | base64 -d 2>/dev/null | sha256sum | cut -c1-64)
		if [ "$got" = "$pin" ]; then
			cat "$one"
			return 0
		fi
	done
	return 1
}

# trust leaves the pinned root in $work/root.pem.
trust() {
	from=$ca
	if [ -z "$from" ]; then
		# The one request that is not verified is for the public root itself,
		# which is worth nothing unless its fingerprint is the pinned one.
		from=$work/offered.pem
		if have curl; then
			curl -fsS --proto '=https' --connect-timeout 10 --insecure -o "$from" "https://$server/onboard/root-cert.pem"
		else
			wget -q --https-only --timeout=30 --no-check-certificate -O "$from" "https://$server/onboard/root-cert.pem"
		fi || die "cannot fetch the root certificate from https://$server"
	fi
	[ -r "$from" ] || die "--ca $from cannot be read"
	pick_root "$from" >"$work/root.pem" ||
		die "no certificate in $from has the fingerprint $pin: this is not the mesh you were invited to, or the invitation is old"
}

# --- checking -----------------------------------------------------------------

listening() {
	hex=$(printf ':%04X' "$1")
	cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk -v p="$hex" '$4 == "0A" && substr($2, length($2) - 4) == p {f = 1} END {exit !f}'
}

check_machine() {
	if [ "$(id -u)" -eq 0 ]; then ok "running as root"; else bad "not root: run it with sudo"; fi
	kernel=$(uname -r)
	major=${kernel%%.*} rest=${kernel#*.}
	minor=${rest%%[!0-9]*}
	if [ "$major" -gt 4 ] || { [ "$major" -eq 4 ] && [ "${minor:-0}" -ge 18 ]; }; then ok "kernel $kernel"; else bad "kernel $kernel: 4.18 or newer is needed"; fi
	case $(uname -m) in
	x86_64) arch=amd64 ;;
	aarch64) arch=arm64 ;;
	*)
		arch=''
		bad "processor $(uname -m): only x86_64 and aarch64"
		;;
	esac
	if ! have curl && ! { have wget && wget --help 2>&1 | grep -q -e --ca-certificate; }; then
		bad "neither curl nor GNU wget: install one of them"
	fi
	for tool in awk base64 cmp cut sed sha256sum; do have "$tool" || bad "$tool is missing"; done
	if [ "$capture" = true ]; then
		if ! have nft; then
			bad "nft is missing: install the package nftables, or use --no-capture"
		elif ! nft list tables >/dev/null 2>&1; then
			bad "nft does not work here: the kernel lacks nf_tables, or this is not root"
		else ok "nftables $(nft --version | awk '{print $2}')"; fi
	fi
	free=$(df -Pk /usr/local 2>/dev/null | awk 'NR == 2 {print int($4 / 1024)}')
	if [ "${free:-0}" -ge 300 ]; then ok "disk: $free MB free in /usr/local"; else bad "disk: ${free:-0} MB free in /usr/local, 300 needed"; fi
	if systemd; then ok "systemd"; else warn "no systemd: call '$SBIN/mesh-agent-service start' from your boot scripts"; fi
	check_ports
}

check_ports() {
	if agent_running; then
		ok "the agent is running"
		return
	fi
	taken=''
	for port in $PORTS; do
		if listening "$port"; then taken="$taken $port"; fi
	done
	if [ -z "$taken" ]; then ok "ports $PORTS are free"; else bad "ports in use:$taken"; fi
}

# joined tells whether there is a certificate that can still renew itself. An agent
# that cannot tell is believed to have one.
joined() {
	[ -f "$STATE/identity.pem" ] || return 1
	! "$BIN/mesh-agent" certificate --help >/dev/null 2>&1 ||
		"$BIN/mesh-agent" certificate --state-dir "$STATE" >"$work/certificate" 2>"$work/ended"
}

# check_certificate says how a machine that was away for too long comes back.
check_certificate() {
	[ -f "$STATE/identity.pem" ] || return 0
	if joined; then
		ok "certificate: $(cat "$work/certificate" 2>/dev/null)"
	elif [ -n "$token_file" ]; then
		ok "certificate: it has ended, and there is a new token"
	else
		bad "$(sed 's/^.*the certificate/certificate: that/' "$work/ended" | tail -n 1). It needs a new token: run 'mesh vm onboard $name' where you have the command, then the line that it prints, which asks for the token"
	fi
}

check_server() {
	host=${server%:*}
	case $host in
	*[!0-9.:\[\]]*)
		if have getent && ! getent hosts "$host" >/dev/null; then bad "DNS: $host cannot be resolved"; else ok "DNS: $host"; fi
		;;
	esac
	if get "/onboard/$name/config" "$work/agent.json" 2>"$work/error"; then
		ok "registered as $name at $server"
	else
		bad "https://$server/onboard/$name/config: $(tail -n 1 "$work/error")"
		return 0
	fi
	check_clock
	# Discovery and certificates; only whether it answers matters here.
	# Of several replicas of meshd one is enough.
	controls=$(sed -n 's/.*"server": *"\([^"]*\)".*/\1/p' "$work/agent.json" | head -n 1 | tr ',' ' ')
	have curl || return 0
	answered=''
	for control in $controls; do
		code=0
		curl -s --connect-timeout 5 --max-time 8 --cacert "$work/root.pem" -o /dev/null "https://$control/" || code=$?
		case $code in
		6 | 7 | 28) problem="$control cannot be reached: open this port" ;;
		60) problem="$control shows a certificate of another mesh" ;;
		*)
			answered=$control
			ok "$control answers"
			continue
			;;
		esac
		printf '%s\n' "$problem" >>"$work/silent"
	done
	[ -f "$work/silent" ] || return 0
	while read -r problem; do
		if [ -n "$answered" ]; then warn "$problem"; else bad "$problem"; fi
	done <"$work/silent"
}

# A clock that is off makes valid certificates invalid.
check_clock() {
	have curl || return 0
	theirs=$(curl -sI --cacert "$work/root.pem" "https://$server/onboard/root-cert.pem" | tr -d '\r' | sed -n 's/^[Dd]ate: //p' | head -n 1)
	theirs=$(date -u -d "$theirs" +%s 2>/dev/null || :)
	if [ -z "$theirs" ]; then
		warn "clock: not compared, this machine's date does not read HTTP dates"
		return 0
	fi
	skew=$(($(date -u +%s) - theirs))
	if [ "${skew#-}" -le 60 ]; then ok "clock: ${skew}s apart"; else bad "clock: ${skew}s apart from meshd: set it, by NTP for example"; fi
}

# --- changing -----------------------------------------------------------------

# The manifest has one line for each thing made: "dir PATH", "new PATH", and
# "old PATH" where something was there, whose copy is kept beside the manifest.
recorded() { [ -f "$MANIFEST" ] && grep -q -x -F -e "new $1" -e "old $1" "$MANIFEST"; }
kept() { printf '%s/kept%s' "$STATE" "$(printf '%s' "$1" | tr / _)"; }

note() {
	changed=true
	if [ "$dry" = true ]; then
		say "  would $1 $2"
		return 1
	fi
	say "  $1 $2"
}

make_dir() {
	[ -d "$1" ] && return
	note make "$1" || return 0
	mkdir -p "$1"
	chmod "$2" "$1"
	printf 'dir %s\n' "$1" >>"$work/made"
	[ ! -d "$STATE" ] || flush_made
}

# flush_made moves notes into the manifest as soon as its folder exists.
flush_made() {
	[ -f "$work/made" ] || return 0
	cat "$work/made" >>"$MANIFEST"
	rm -f "$work/made"
}

# put FILE PATH MODE installs a file unless it is there already.
put() {
	if [ -f "$2" ] && cmp -s "$1" "$2" && [ "$(stat -c %a "$2")" = "$3" ]; then return; fi
	note install "$2" || return 0
	if ! recorded "$2"; then
		if [ -e "$2" ]; then
			cp -p "$2" "$(kept "$2")"
			printf 'old %s\n' "$2" >>"$MANIFEST"
		else
			printf 'new %s\n' "$2" >>"$MANIFEST"
		fi
	fi
	cp -p "$1" "$2.new"
	chmod "$3" "$2.new"
	mv -f "$2.new" "$2"
}

# read_token leaves it in $work/token; without --token-file it is asked for.
read_token() {
	if [ -n "$token_file" ]; then
		head -n 1 "$token_file" | tr -d ' \t\r\n' >"$work/token"
	elif [ -t 0 ]; then
		printf 'Token (not shown): ' >&2
		trap 'stty echo; exit 1' INT TERM
		stty -echo
		IFS= read -r token || :
		stty echo
		trap - INT TERM
		printf '\n' >&2
		printf '%s' "$token" | tr -d ' \t\r\n' >"$work/token"
		token=''
	else
		IFS= read -r token || :
		printf '%s' "$token" | tr -d ' \t\r\n' >"$work/token"
		token=''
	fi
	case $(cut -c1-11 "$work/token") in
	isthmus-vm.) ;;
	*) die "that is not a join token: it begins with isthmus-vm." ;;
	esac
}

fetch_programs() {
	get_newer "/onboard/mesh-agent?arch=$arch" "$work/mesh-agent" "$BIN/mesh-agent" || die "cannot fetch mesh-agent from https://$server"
	[ -n "$envoy" ] && return
	if have envoy && ! recorded "$BIN/envoy"; then
		envoy=$(command -v envoy)
	elif get_newer "/onboard/envoy?arch=$arch" "$work/envoy" "$BIN/envoy" 2>"$work/error"; then
		envoy=$BIN/envoy
	else
		die "meshd offers no Envoy ($(tail -n 1 "$work/error")), and none is installed: give one with --envoy PATH"
	fi
}

write_env() {
	cat >"$work/agent.env" <<TEXT
MESH_ROOT_CERT_FILE=$CONF/root-cert.pem
MESH_TOKEN_FILE=$CONF/token
MESH_STATE_DIR=$STATE
MESH_RUN_DIR=$RUN
MESH_ENVOY=$envoy
MESH_REDIRECT=$capture
TEXT
	# What the machine's owner decides stays.
	if [ -f "$CONF/agent.env" ]; then sed -n '/^MESH_WORKLOAD_/p' "$CONF/agent.env" >>"$work/agent.env"; fi
}

# write_service makes what does systemd's work where there is none.
write_service() {
	cat >"$work/service" <<'TEXT'
#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs mesh-agent on a machine without systemd. Call "start" at boot.
set -eu
run=/run/isthmus log=/var/log/mesh-agent.log
pid() { cat "$run/service.pid" 2>/dev/null || echo 0; }
running() {
	p=$(pid)
	[ "$p" -gt 1 ] && tr '\0' ' ' <"/proc/$p/cmdline" 2>/dev/null | grep -q mesh-agent-service
}
case ${1:-} in
start)
	if running; then echo "mesh-agent is running"; exit 0; fi
	mkdir -p "$run"
	# A clean environment: the caller's may configure other programs of the mesh.
	set -- env -i PATH="$PATH" "$0" run
	if command -v setsid >/dev/null 2>&1; then set -- setsid "$@"; else set -- nohup "$@"; fi
	"$@" </dev/null >>"$log" 2>&1 &
	echo $! >"$run/service.pid"
	;;
run)
	echo $$ >"$run/service.pid"
	set -a
	. /etc/isthmus/agent.env
	set +a
	child=0
	trap 'kill -TERM "$child" 2>/dev/null || :; wait "$child" || :; rm -f "$run/service.pid"; exit 0' TERM INT
	while :; do
		/usr/local/bin/mesh-agent proxy --role vm --config /etc/isthmus/agent.json &
		child=$!
		if wait "$child"; then break; fi
		/usr/local/bin/mesh-agent redirect --undo || :
		sleep 1
	done
	rm -f "$run/service.pid"
	;;
stop)
	running || exit 0
	p=$(pid)
	kill -TERM "$p"
	n=0
	while [ -d "/proc/$p" ] && [ "$n" -lt 600 ]; do sleep 0.1 2>/dev/null || sleep 1; n=$((n + 1)); done
	;;
status) if running; then echo running; else echo stopped; exit 3; fi ;;
*) echo "usage: mesh-agent-service start|stop|status" >&2; exit 2 ;;
esac
TEXT
}

agent_running() {
	if systemd; then systemctl is-active --quiet mesh-agent; else [ -x "$SBIN/mesh-agent-service" ] && "$SBIN/mesh-agent-service" status >/dev/null 2>&1; fi
}
agent_start() {
	if systemd; then
		systemctl daemon-reload
		systemctl enable --quiet mesh-agent
		systemctl restart mesh-agent
	else
		"$SBIN/mesh-agent-service" stop
		"$SBIN/mesh-agent-service" start
	fi
}
agent_stop() {
	if systemd; then
		systemctl disable --now --quiet mesh-agent 2>/dev/null || :
	elif [ -x "$SBIN/mesh-agent-service" ]; then
		"$SBIN/mesh-agent-service" stop || :
	fi
}
agent_log() {
	if systemd; then journalctl -u mesh-agent -n 15 --no-pager -o cat; else tail -n 15 "$LOG"; fi
}

start_and_wait() {
	if [ "$dry" = true ]; then
		[ "$changed" = false ] || say "  would start mesh-agent"
		return
	fi
	if [ "$changed" = true ] || ! agent_running; then
		changed=true
		say "  start mesh-agent"
		agent_start
	fi
	if ! "$BIN/mesh-agent" wait --timeout 60s 2>"$work/error"; then
		cat "$work/error" >&2
		agent_log >&2 || :
		die "the agent runs and is not ready yet; the lines above say why. It goes on trying."
	fi
	# Spent by now; the certificate renews itself.
	if [ -f "$STATE/identity.pem" ]; then rm -f "$CONF/token"; fi
}

install_all() {
	say "mesh-onboard: $name at $server"
	trust
	check_machine
	check_server
	[ "$failures" -eq 0 ] || die "$failures of the checks failed; nothing was changed"
	if [ -n "$token_file" ] || ! joined; then
		[ ! -f "$STATE/identity.pem" ] || warn "the certificate has ended: a new token is needed (mesh vm onboard $name)"
		[ "$dry" = true ] || read_token
	fi
	fetch_programs
	get /onboard/mesh-agent.service "$work/unit" || die "cannot fetch the unit from https://$server"
	write_env
	write_service
	make_dir "$STATE" 700
	[ "$dry" = true ] || flush_made
	make_dir "$CONF" 700
	make_dir "$BIN" 755
	make_dir "$SBIN" 755
	put "$work/mesh-agent" "$BIN/mesh-agent" 755
	[ ! -f "$work/envoy" ] || put "$work/envoy" "$BIN/envoy" 755
	put "$work/root.pem" "$CONF/root-cert.pem" 644
	put "$work/agent.json" "$CONF/agent.json" 600
	put "$work/agent.env" "$CONF/agent.env" 600
	[ ! -f "$work/token" ] || put "$work/token" "$CONF/token" 600
	if systemd; then put "$work/unit" "$UNIT" 644; else put "$work/service" "$SBIN/mesh-agent-service" 755; fi
	start_and_wait
	if [ "$dry" = true ]; then
		say "nothing was changed (--dry-run)"
	elif [ "$changed" = false ]; then
		say "unchanged"
	else
		say "joined: $name is ready. Undo: sh mesh-onboard.sh --uninstall"
	fi
}

uninstall() {
	[ "$(id -u)" -eq 0 ] || die "not root: run it with sudo"
	if [ ! -f "$MANIFEST" ]; then
		say "nothing to uninstall: $MANIFEST does not exist"
		return
	fi
	if [ "$dry" = true ]; then
		sed 's/^dir /  would remove folder /; s/^new /  would remove /; s/^old /  would restore /' "$MANIFEST"
		return
	fi
	say "  stop mesh-agent"
	agent_stop
	[ ! -x "$BIN/mesh-agent" ] || "$BIN/mesh-agent" redirect --undo 2>/dev/null || :
	cp "$MANIFEST" "$work/manifest"
	sed '1!G;h;$!d' "$work/manifest" >"$work/backwards"
	while read -r what path; do
		case $what in
		new)
			say "  remove $path"
			rm -f "$path"
			;;
		old)
			say "  restore $path"
			mv -f "$(kept "$path")" "$path"
			;;
		esac
	done <"$work/backwards"
	rm -f "$LOG"
	rm -rf "$RUN" "$RUN-workload"
	# Key and certificate are ours whatever the manifest says.
	rm -f "$STATE"/identity.pem "$STATE"/identity.pem.key "$STATE"/configuration "$STATE"/manifest
	while read -r what path; do
		[ "$what" = dir ] || continue
		say "  remove folder $path"
		rmdir "$path" 2>/dev/null || warn "$path is not empty and stays"
	done <"$work/backwards"
	if systemd; then systemctl daemon-reload; fi
	say "uninstalled"
}

main() {
	options "$@"
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	case $mode in
	check)
		trust
		check_machine
		check_server
		check_certificate
		[ "$failures" -eq 0 ] || die "$failures of the checks failed"
		say "this machine can join"
		;;
	uninstall) uninstall ;;
	install) install_all ;;
	esac
}

main "$@"
