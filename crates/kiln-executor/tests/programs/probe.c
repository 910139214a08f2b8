/* Prints what a process in a step can see and do, one "name=value" per line. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define TRY(name, call) do { errno = 0; long r = (call); printf("call.%s=%d\n", name, r == -1 ? errno : 0); } while (0)

static void lines(const char *file, const char *const *wanted) {
	FILE *f = fopen(file, "r");
	char line[4096];
	if (!f) return;
	while (fgets(line, sizeof line, f))
		for (const char *const *w = wanted; *w; w++)
			if (!strncmp(line, *w, strlen(*w)))
				printf("status.%s", line);
	fclose(f);
}

static void path(const char *p) {
	struct stat st;
	char buf[16];
	if (lstat(p, &st)) { printf("path.%s=missing\n", p); return; }
	int fd = open(p, O_RDONLY | O_NONBLOCK | (S_ISDIR(st.st_mode) ? O_DIRECTORY : 0));
	long n = fd < 0 ? -errno : S_ISDIR(st.st_mode) ? syscall(SYS_getdents64, fd, (char[4096]){0}, 4096) : read(fd, buf, sizeof buf);
	int w = open(p, O_WRONLY | O_NONBLOCK);
	printf("path.%s=%s read %ld write %d\n", p, S_ISDIR(st.st_mode) ? "dir" : S_ISCHR(st.st_mode) ? "chr" : "file",
	       S_ISDIR(st.st_mode) && n > 0 ? (n <= 48 ? 0 : 1) : n > 0 ? 1 : n, S_ISDIR(st.st_mode) ? access(p, W_OK) ? errno : 0 : w < 0 ? errno : 0);
}

int main(int argc, char **argv) {
	static const char *const wanted[] = {"Cap", "NoNewPrivs", "Seccomp:", "Seccomp_filters", "Groups", "Uid", "Gid", 0};
	char host[65] = "", cwd[4096] = "";
	if (getpid() != 1) {
		/* What is tried below would succeed for root outside. */
		fputs("the probe runs as first process of a pid namespace only\n", stderr);
		return 2;
	}
	lines("/proc/self/status", wanted);
	gethostname(host, sizeof host);
	printf("host=%s\npid=%d\nsid=%d\ncwd=%s\n", host, getpid(), getsid(0), getcwd(cwd, sizeof cwd));
	mode_t old = umask(0);
	umask(old);
	printf("umask=%o\n", old);
	for (char **e = environ; *e; e++) printf("env.%s\n", *e);
	for (int i = 1; i < argc; i++) printf("arg.%d=%s\n", i, argv[i]);

	for (int fd = 3; fd < 256; fd++)
		if (fcntl(fd, F_GETFD) >= 0) printf("open.%d\n", fd);
	TRY("mount", mount("none", "/", "tmpfs", 0, ""));
	TRY("umount2", umount2("/proc", 0));
	TRY("unshare_user", syscall(SYS_unshare, CLONE_NEWUSER));
	TRY("unshare_net", syscall(SYS_unshare, CLONE_NEWNET));
	TRY("setns", syscall(SYS_setns, 0, 0));
	TRY("clone_user", syscall(SYS_clone, CLONE_NEWUSER | CLONE_VM, 0, 0, 0, 0));
	TRY("clone3", syscall(SYS_clone3, 0, 0));
	TRY("bpf", syscall(SYS_bpf, 0, 0, 0));
	TRY("keyctl", syscall(SYS_keyctl, 0, -3, 0));
	TRY("add_key", syscall(SYS_add_key, "user", "x", "y", 1, -3));
	TRY("kexec_load", syscall(SYS_kexec_load, 0, 0, 0, 0));
	TRY("init_module", syscall(SYS_init_module, 0, 0, ""));
	TRY("perf_event_open", syscall(SYS_perf_event_open, 0, 0, 0, 0, 0));
	TRY("io_uring_setup", syscall(SYS_io_uring_setup, 1, 0));
	TRY("userfaultfd", syscall(SYS_userfaultfd, 0));
	TRY("pivot_root", syscall(SYS_pivot_root, "/", "/"));
	TRY("reboot", syscall(SYS_reboot, 0, 0, 0, 0));
	TRY("swapon", syscall(SYS_swapon, "/x", 0));
	TRY("settimeofday", syscall(SYS_settimeofday, 0, 0));
	TRY("sethostname", syscall(SYS_sethostname, "x", 1));
	TRY("open_by_handle_at", syscall(SYS_open_by_handle_at, -1, 0, 0));
	TRY("fsopen", syscall(SYS_fsopen, "tmpfs", 0));
	TRY("iopl", syscall(SYS_iopl, 3));
	TRY("acct", syscall(SYS_acct, 0));
	TRY("quotactl", syscall(SYS_quotactl, 0, 0, 0, 0));
	TRY("syslog", syscall(SYS_syslog, 10, 0, 0));
	TRY("unknown_9999", syscall(9999));
	TRY("socket_vsock", socket(40, SOCK_STREAM, 0));
	TRY("socket_alg", socket(38, SOCK_SEQPACKET, 0));
	TRY("socket_inet", socket(AF_INET, SOCK_STREAM, 0));
	TRY("socket_raw", socket(AF_INET, SOCK_RAW, 1));
	TRY("personality_ask", syscall(SYS_personality, 0xffffffff));
	TRY("personality_odd", syscall(SYS_personality, 0x0400000));
	TRY("chroot", chroot("/"));
	TRY("mknod_block", mknod("/tmp/blk", S_IFBLK | 0600, makedev(254, 0)));
	TRY("open_block", open("/tmp/blk", O_RDONLY));
	TRY("mknod_null", mknod("/tmp/null", S_IFCHR | 0666, makedev(1, 3)));
	TRY("open_null", open("/tmp/null", O_RDWR));
	TRY("open_kmsg", (mknod("/tmp/kmsg", S_IFCHR | 0666, makedev(1, 11)), open("/tmp/kmsg", O_RDONLY)));
	unlink("/tmp/blk"); unlink("/tmp/null"); unlink("/tmp/kmsg");

	static const char *const paths[] = {"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/acpi",
		"/proc/scsi", "/sys/firmware", "/proc/sysrq-trigger", "/proc/sys/kernel/hostname", "/proc/sys", "/proc/irq", "/proc/bus",
		"/sys", "/sys/fs/cgroup", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx",
		"/dev/console", "/dev/kmsg", "/dev/mem", "/dev/shm", "/dev/mqueue", "/dev/pts", "/run", "/etc/hosts", "/etc/resolv.conf", 0};
	for (const char *const *p = paths; *p; p++) path(*p);

	static const struct { const char *name; int number; } limits[] = {{"nofile", RLIMIT_NOFILE}, {"core", RLIMIT_CORE}, {"nproc", RLIMIT_NPROC}, {"stack", RLIMIT_STACK}, {0, 0}};
	for (int i = 0; limits[i].name; i++) {
		struct rlimit r;
		getrlimit(limits[i].number, &r);
		printf("limit.%s=%ld:%ld\n", limits[i].name, (long)r.rlim_cur, (long)r.rlim_max);
	}
	static const char *const spaces[] = {"mnt", "pid", "uts", "ipc", "cgroup", "net", "user", 0};
	for (int i = 0; spaces[i]; i++) {
		char name[64], to[64] = "";
		snprintf(name, sizeof name, "/proc/self/ns/%s", spaces[i]);
		if (readlink(name, to, sizeof to - 1) > 0) printf("ns.%s=%s\n", spaces[i], to);
	}
	return 0;
}
