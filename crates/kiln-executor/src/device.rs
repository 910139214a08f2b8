//! Which device nodes a confined process may use: lines for v1's `devices` controller, a program for v2.

use crate::sys::BpfInstruction;

/// One permission. `None` as number is any.
pub(crate) struct DeviceRule {
    kind: Kind,
    major: Option<u32>,
    minor: Option<u32>,
    access: Access,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Block,
    Character,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    /// Only create the node.
    Create,
    /// Create, read, write.
    All,
}

const fn character(major: u32, minor: Option<u32>) -> DeviceRule {
    DeviceRule {
        kind: Kind::Character,
        major: Some(major),
        minor,
        access: Access::All,
    }
}

/// Any node may be created (images contain them), only these may be opened.
pub(crate) const DEVICE_RULES: [DeviceRule; 11] = [
    DeviceRule {
        kind: Kind::Character,
        major: None,
        minor: None,
        access: Access::Create,
    },
    DeviceRule {
        kind: Kind::Block,
        major: None,
        minor: None,
        access: Access::Create,
    },
    character(1, Some(3)),
    character(1, Some(5)),
    character(1, Some(7)),
    character(1, Some(8)),
    character(1, Some(9)),
    character(5, Some(0)),
    character(5, Some(1)),
    character(5, Some(2)),
    character(136, None),
];

impl DeviceRule {
    /// As a line for `devices.allow`.
    pub(crate) fn v1(&self) -> String {
        let kind = if self.kind == Kind::Block { 'b' } else { 'c' };
        let number = |n: Option<u32>| n.map_or_else(|| "*".to_owned(), |n| n.to_string());
        let access = if self.access == Access::All { "rwm" } else { "m" };
        format!("{kind} {}:{} {access}", number(self.major), number(self.minor))
    }
}

// Encodings of eBPF (kernel documentation, "BPF Instruction Set").
const LOAD_WORD: u8 = 0x61;
const AND_IMMEDIATE: u8 = 0x54;
const RIGHT_SHIFT: u8 = 0x74;
const MOVE_IMMEDIATE: u8 = 0xb4;
const MOVE_REGISTER: u8 = 0xbc;
const JUMP_NOT_EQUAL: u8 = 0x56;
const EXIT: u8 = 0x95;

// `struct bpf_cgroup_dev_ctx`: access_type (type in the low, access in the high half), major, minor.
const OFFSET_ACCESS: i16 = 0;
const OFFSET_MAJOR: i16 = 4;
const OFFSET_MINOR: i16 = 8;
const TYPE_BLOCK: i32 = 1;
const TYPE_CHARACTER: i32 = 2;
const ACCESS_MKNOD: i32 = 1;
const ACCESS_ALL: i32 = 7;

/// The rules as a program for a v2 control group: 1 permits, 0 refuses.
pub(crate) fn device_program() -> Vec<BpfInstruction> {
    let op = |code: u8, dst: u8, src: u8, offset: i16, immediate: i32| BpfInstruction {
        code,
        registers: dst | (src << 4),
        offset,
        immediate,
    };
    let mut program = vec![
        // r2 = type, r3 = access, r4 = major, r5 = minor
        op(LOAD_WORD, 2, 1, OFFSET_ACCESS, 0),
        op(MOVE_REGISTER, 3, 2, 0, 0),
        op(AND_IMMEDIATE, 2, 0, 0, 0xffff),
        op(RIGHT_SHIFT, 3, 0, 0, 16),
        op(LOAD_WORD, 4, 1, OFFSET_MAJOR, 0),
        op(LOAD_WORD, 5, 1, OFFSET_MINOR, 0),
    ];
    for rule in &DEVICE_RULES {
        let mut tests = vec![(
            2,
            if rule.kind == Kind::Block {
                TYPE_BLOCK
            } else {
                TYPE_CHARACTER
            },
        )];
        if let Some(major) = rule.major {
            tests.push((4, major as i32));
        }
        if let Some(minor) = rule.minor {
            tests.push((5, minor as i32));
        }
        let allowed = if rule.access == Access::All {
            ACCESS_ALL
        } else {
            ACCESS_MKNOD
        };
        // Nothing asked beyond what is allowed: (access & !allowed) == 0.
        let mut block = vec![
            op(MOVE_REGISTER, 0, 3, 0, 0),
            op(AND_IMMEDIATE, 0, 0, 0, !allowed),
            op(JUMP_NOT_EQUAL, 0, 0, 2, 0),
            op(MOVE_IMMEDIATE, 0, 0, 0, 1),
            op(EXIT, 0, 0, 0, 0),
        ];
        for (register, value) in tests.into_iter().rev() {
            let over = block.len() as i16;
            block.insert(0, op(JUMP_NOT_EQUAL, register, 0, over, value));
        }
        program.extend(block);
    }
    program.extend([op(MOVE_IMMEDIATE, 0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let program = device_program();
        let mut r = [0i32; 6];
        let mut pc = 0usize;
        loop {
            let i = program[pc];
            pc += 1;
            let (dst, src) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            match i.code {
                LOAD_WORD => {
                    r[dst] = match i.offset {
                        OFFSET_ACCESS => kind | (access << 16),
                        OFFSET_MAJOR => major,
                        _ => minor,
                    }
                }
                MOVE_REGISTER => r[dst] = r[src],
                MOVE_IMMEDIATE => r[dst] = i.immediate,
                AND_IMMEDIATE => r[dst] &= i.immediate,
                RIGHT_SHIFT => r[dst] = ((r[dst] as u32) >> i.immediate) as i32,
                JUMP_NOT_EQUAL if r[dst] != i.immediate => pc += i.offset as usize,
                JUMP_NOT_EQUAL => {}
                EXIT => return r[0] == 1,
                other => panic!("code {other:#x}"),
            }
        }
    }

    #[test]
    fn program_follows_the_rules() {
        assert!(permits(TYPE_CHARACTER, ACCESS_ALL, 1, 3));
        assert!(permits(TYPE_CHARACTER, 2, 136, 77));
        assert!(permits(TYPE_BLOCK, ACCESS_MKNOD, 8, 0));
        assert!(!permits(TYPE_BLOCK, 2, 8, 0));
        assert!(!permits(TYPE_BLOCK, ACCESS_MKNOD | 2, 8, 0));
        assert!(!permits(TYPE_CHARACTER, 2, 1, 1));
        assert!(!permits(TYPE_BLOCK, 2, 1, 3));
    }

    #[test]
    fn lines_for_v1() {
        let lines: Vec<_> = DEVICE_RULES.iter().map(DeviceRule::v1).collect();
        assert_eq!(lines[..3], ["c *:* m", "b *:* m", "c 1:3 rwm"]);
        assert_eq!(lines[10], "c 136:* rwm");
    }
}
