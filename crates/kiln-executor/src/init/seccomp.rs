//! The default system call filter: a table of what builds need, compiled to a classic BPF program (`seccomp(2)`).
//!
//! The program begins with the architecture, so 32-bit programs in an image run under a table of their own numbers.

use libc::sock_filter;

const TABLE: &str = include_str!("seccomp.tbl");

const EPERM: u32 = libc::EPERM as u32;
const ENOSYS: u32 = libc::ENOSYS as u32;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const ERRNO: u32 = libc::SECCOMP_RET_ERRNO;

// Offsets in `struct seccomp_data`.
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
/// Low half of the first argument (both architectures here are little endian).
const OFFSET_ARGUMENT: u32 = 16;

/// x32 system calls carry this bit.
const X32_BIT: u32 = 0x4000_0000;
/// The newest system call number known to the table's author; equal on all architectures since 424.
const NEWEST: u32 = 469;

const CLONE_NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP) as u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Allow,
    Refuse,
    NoSys,
    Socket,
    Personality,
    Clone,
}

/// One architecture: its `AUDIT_ARCH_*` value and its column in the table.
struct Arch {
    audit: u32,
    column: usize,
}

#[cfg(target_arch = "x86_64")]
const ARCHES: [Arch; 2] = [
    Arch {
        audit: 0xc000_003e,
        column: 0,
    },
    Arch {
        audit: 0x4000_0003,
        column: 1,
    },
];
#[cfg(target_arch = "aarch64")]
const ARCHES: [Arch; 2] = [
    Arch {
        audit: 0xc000_00b7,
        column: 2,
    },
    Arch {
        audit: 0x4000_0028,
        column: 3,
    },
];

/// The filter for a confined process.
pub(crate) fn default_filter() -> Vec<sock_filter> {
    let mut program = vec![load(OFFSET_ARCH)];
    for arch in &ARCHES {
        let body = arch_program(arch);
        // Another architecture: over this body. Bodies may be longer than a conditional jump reaches.
        program.push(jump_if_equal(arch.audit, 1, 0));
        program.push(jump(body.len() as u32));
        program.extend(body);
    }
    program.push(give(ERRNO | EPERM));
    program
}

fn arch_program(arch: &Arch) -> Vec<sock_filter> {
    let mut calls: Vec<(u32, Rule)> = table()
        .filter_map(|row| row.numbers[arch.column].map(|n| (n, row.rule)))
        .collect();
    calls.sort_unstable_by_key(|c| c.0);
    // Half-open ranges of numbers with one rule each, from 0 up.
    let mut ranges: Vec<(u32, Rule)> = vec![(0, Rule::Refuse)];
    let mut begin = |from: u32, rule: Rule| {
        match ranges.last_mut() {
            Some(last) if last.0 == from => last.1 = rule,
            Some(last) if last.1 == rule && matches!(rule, Rule::Allow | Rule::Refuse | Rule::NoSys) => {}
            _ => ranges.push((from, rule)),
        };
    };
    for (number, rule) in calls {
        begin(number, rule);
        let after = if number < NEWEST { Rule::Refuse } else { Rule::NoSys };
        begin(number + 1, after);
    }
    begin(NEWEST + 1, Rule::NoSys);
    ranges.sort_by_key(|r| r.0);
    // Neighbours may have become equal where one range was overwritten.
    ranges.dedup_by(|next, kept| next.1 == kept.1 && matches!(kept.1, Rule::Allow | Rule::Refuse | Rule::NoSys));
    let mut body = vec![load(OFFSET_NUMBER)];
    if arch.column == 0 {
        body.push(jump_if_at_least(X32_BIT, 0, 1));
        body.push(give(ERRNO | ENOSYS));
    }
    body.extend(search(&ranges));
    body
}

/// A binary search that ends in the rule of the range the number is in.
fn search(ranges: &[(u32, Rule)]) -> Vec<sock_filter> {
    let Some((first, rest)) = ranges.split_first() else {
        return vec![give(ERRNO | EPERM)];
    };
    if rest.is_empty() {
        return leaf(first.1);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let boundary = high.first().map_or(0, |r| r.0);
    let (low, high) = (search(low), search(high));
    let mut out = Vec::with_capacity(low.len() + high.len() + 2);
    match u8::try_from(low.len()) {
        Ok(distance) => out.push(jump_if_at_least(boundary, distance, 0)),
        Err(_) => out.extend([jump_if_at_least(boundary, 0, 1), jump(low.len() as u32)]),
    }
    out.extend(low);
    out.extend(high);
    out
}

fn leaf(rule: Rule) -> Vec<sock_filter> {
    match rule {
        Rule::Allow => vec![give(ALLOW)],
        Rule::Refuse => vec![give(ERRNO | EPERM)],
        Rule::NoSys => vec![give(ERRNO | ENOSYS)],
        Rule::Socket => vec![
            load(OFFSET_ARGUMENT),
            jump_if_equal(libc::AF_VSOCK as u32, 2, 0),
            jump_if_equal(libc::AF_ALG as u32, 1, 0),
            give(ALLOW),
            give(ERRNO | EPERM),
        ],
        Rule::Personality => {
            // Linux, the 3 GiB address space limit, and both of them with UNAME26; all ones asks without changing.
            let values = [0, 0x0008, 0x2_0000, 0x2_0008, 0xffff_ffff];
            let mut out = vec![load(OFFSET_ARGUMENT)];
            for (i, value) in values.into_iter().enumerate() {
                out.push(jump_if_equal(value, (values.len() - i) as u8, 0));
            }
            out.extend([give(ERRNO | EPERM), give(ALLOW)]);
            out
        }
        Rule::Clone => vec![
            load(OFFSET_ARGUMENT),
            instruction(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 1, 0, CLONE_NAMESPACES),
            give(ALLOW),
            give(ERRNO | EPERM),
        ],
    }
}

struct Row {
    rule: Rule,
    numbers: [Option<u32>; 4],
}

fn table() -> impl Iterator<Item = Row> {
    TABLE
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let rule = match fields.next()? {
                // The default capabilities contain CAP_SYS_CHROOT, and without it the kernel refuses.
                "allow" | "chroot" => Rule::Allow,
                "socket" => Rule::Socket,
                "personality" => Rule::Personality,
                "clone" => Rule::Clone,
                "nosys" => Rule::NoSys,
                _ => return None,
            };
            let mut numbers = [None; 4];
            for slot in &mut numbers {
                *slot = fields.next()?.parse().ok();
            }
            Some(Row { rule, numbers })
        })
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

fn jump_if_equal(value: u32, jt: u8, jf: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, value)
}

fn jump_if_at_least(value: u32, jt: u8, jf: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, jt, jf, value)
}

fn jump(distance: u32) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, distance)
}

fn give(action: u32) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, 0, action)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would.
    fn run(program: &[sock_filter], arch: u32, number: u32, argument: u32) -> u32 {
        let (mut pc, mut a) = (0usize, 0u32);
        loop {
            let i = &program[pc];
            pc += 1;
            let code = u32::from(i.code);
            match code & 0x07 {
                libc::BPF_LD => {
                    a = match i.k {
                        OFFSET_ARCH => arch,
                        OFFSET_NUMBER => number,
                        OFFSET_ARGUMENT => argument,
                        other => panic!("offset {other}"),
                    }
                }
                libc::BPF_RET => return i.k,
                libc::BPF_JMP => {
                    let taken = match code & 0xf0 {
                        libc::BPF_JA => {
                            pc += i.k as usize;
                            continue;
                        }
                        libc::BPF_JEQ => a == i.k,
                        libc::BPF_JGE => a >= i.k,
                        libc::BPF_JSET => a & i.k != 0,
                        other => panic!("jump {other}"),
                    };
                    pc += usize::from(if taken { i.jt } else { i.jf });
                }
                other => panic!("class {other}"),
            }
        }
    }

    #[test]
    fn every_number_gets_its_rule() {
        let program = default_filter();
        assert!(program.len() < 4096, "{} instructions", program.len());
        for arch in &ARCHES {
            for number in 0..600u32 {
                let rule = table().find(|r| r.numbers[arch.column] == Some(number)).map(|r| r.rule);
                let expected = match rule {
                    Some(Rule::NoSys) => ERRNO | ENOSYS,
                    Some(Rule::Refuse) => unreachable!(),
                    Some(_) => ALLOW,
                    None if number > NEWEST => ERRNO | ENOSYS,
                    None => ERRNO | EPERM,
                };
                assert_eq!(
                    run(&program, arch.audit, number, 0),
                    expected,
                    "column {} number {number}",
                    arch.column
                );
            }
        }
        assert_eq!(run(&program, 0x1234, 1, 0), ERRNO | EPERM);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn arguments_decide() {
        let program = default_filter();
        let call = |n: libc::c_long, argument: u32| run(&program, ARCHES[0].audit, n as u32, argument);
        assert_eq!(call(libc::SYS_socket, libc::AF_INET as u32), ALLOW);
        assert_eq!(call(libc::SYS_socket, libc::AF_VSOCK as u32), ERRNO | EPERM);
        assert_eq!(call(libc::SYS_socket, libc::AF_ALG as u32), ERRNO | EPERM);
        assert_eq!(call(libc::SYS_clone, libc::SIGCHLD as u32), ALLOW);
        assert_eq!(call(libc::SYS_clone, libc::CLONE_NEWUSER as u32), ERRNO | EPERM);
        assert_eq!(call(libc::SYS_clone3, 0), ERRNO | ENOSYS);
        assert_eq!(call(libc::SYS_personality, 0x2_0008), ALLOW);
        assert_eq!(call(libc::SYS_personality, 0xffff_ffff), ALLOW);
        assert_eq!(call(libc::SYS_personality, 0x40000), ERRNO | EPERM);
        assert_eq!(run(&program, ARCHES[0].audit, X32_BIT | 1, 0), ERRNO | ENOSYS);
        for forbidden in [
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS_io_uring_setup,
        ] {
            assert_eq!(call(forbidden, 0), ERRNO | EPERM);
        }
    }
}
