# SPDX-License-Identifier: MIT
# Completion of diskseqfs(8) in bash. It asks the kernel, and never starts the program.

_diskseqfs_devices() {
	# Paths, then names: from sysfs, and of device-mapper.
	compgen -f -- "$1"
	local name names=()
	for name in /sys/class/block/*; do names+=("${name##*/}"); done
	for name in /sys/block/dm-*/dm/name; do [ -r "$name" ] && names+=("$(<"$name")"); done
	compgen -W "${names[*]}" -- "$1"
}

_diskseqfs() {
	local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command=${COMP_WORDS[1]}
	COMPREPLY=()
	if [ "$COMP_CWORD" -eq 1 ]; then
		mapfile -t COMPREPLY < <(compgen -W 'mount unmount list resolve help --help --version' -- "$word")
		return
	fi
	local words=
	case $command:$before in
	mount:--transport) words='session fuse-native' ;;
	mount:--log-level) words='fatal error warn info debug trace silent' ;;
	mount:--log-format) words='pretty json journal' ;;
	mount:-o) words='linger= hold= open_timeout= transport= log_level= log_format= ro noatime relatime' ;;
	mount:--linger | mount:--hold | mount:--open-timeout) return ;;
	help:*) words='mount unmount list resolve' ;;
	*)
		case $word in
		-*)
			case $command in
			mount) words='--foreground --replace -o --linger --hold --open-timeout --transport --log-level --log-format --help' ;;
			unmount) words='--help' ;;
			list | resolve) words='--json --help' ;;
			esac
			;;
		*)
			case $command in
			mount) mapfile -t COMPREPLY < <(compgen -d -- "$word") ;;
			# Mount points of trees.
			unmount)
				mapfile -t COMPREPLY < <(compgen -W "$(awk '$3 == "fuse.diskseqfs" { print $2 }' /proc/mounts)" -- "$word")
				;;
			resolve) mapfile -t COMPREPLY < <(_diskseqfs_devices "$word") ;;
			esac
			return
			;;
		esac
		;;
	esac
	mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -o filenames -F _diskseqfs diskseqfs
