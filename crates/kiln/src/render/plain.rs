//! Progress line by line, for logs.

use std::io::{self, Write};

use super::{Change, State, amount};

pub(crate) struct Plain<W: Write> {
    out: W,
    /// The step whose lines were written last; a change of step leaves an empty line.
    current: Option<usize>,
    /// The current step has ended. Not written yet: some steps end more than once, and then the last time counts.
    ended: bool,
}

impl<W: Write> Plain<W> {
    pub(crate) fn new(out: W) -> Self {
        Plain {
            out,
            current: None,
            ended: false,
        }
    }

    pub(super) fn show(&mut self, state: &State, changes: &[Change]) -> io::Result<()> {
        for change in changes {
            let index = change.step();
            if self.current != Some(index) {
                self.finish(state)?;
                if self.current.replace(index).is_some() {
                    writeln!(self.out)?;
                }
                if let Some(step) = state.steps.get(index) {
                    writeln!(self.out, "#{} {}", step.number, step.name)?;
                }
            }
            self.ended = false;
            let number = state.steps.get(index).map_or(0, |step| step.number);
            match change {
                Change::Started(_) => {}
                Change::Log(_, at, line) => writeln!(self.out, "#{number} {:.3} {line}", at.as_secs_f64())?,
                // Numbers that move would fill a log; what is complete is worth a line.
                Change::Status(_, status) if status.completed.is_some() => {
                    writeln!(self.out, "#{number} {}{} done", status.id, amount(status))?;
                }
                Change::Status(..) => {}
                Change::Completed(_) => self.ended = true,
            }
        }
        self.out.flush()
    }

    /// Writes how the last step ended.
    pub(super) fn finish(&mut self, state: &State) -> io::Result<()> {
        let step = self.current.and_then(|index| state.steps.get(index));
        let (Some(step), true) = (step, std::mem::take(&mut self.ended)) else {
            return Ok(());
        };
        let number = step.number;
        if step.error.ends_with("context canceled") {
            writeln!(self.out, "#{number} CANCELED")
        } else if !step.error.is_empty() {
            writeln!(self.out, "#{number} ERROR: {}", step.error)
        } else if step.cached {
            writeln!(self.out, "#{number} CACHED")
        } else {
            writeln!(self.out, "#{number} DONE {:.1}s", step.elapsed().as_secs_f64())
        }
    }
}
