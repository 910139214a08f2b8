//! Progress on a terminal: finished steps scroll up, running ones are redrawn below with their last lines.

use std::io::{self, Write as _};
use std::time::{Duration, Instant};

use crossterm::cursor::MoveUp;
use crossterm::style::Stylize as _;
use crossterm::terminal::{Clear, ClearType, size};
use crossterm::{QueueableCommand as _, queue};

use super::{Change, State, Step, amount};

/// How long a step must stay ended before it scrolls up: some end, go on, and end again.
const SETTLED: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
pub(crate) struct Live {
    /// Lines drawn last that the next drawing replaces.
    drawn: u16,
    /// Steps that have ended and have not scrolled up yet.
    ended: Vec<(usize, Instant)>,
}

impl Live {
    pub(super) fn show(&mut self, state: &State, changes: &[Change]) -> io::Result<()> {
        for change in changes {
            if let Change::Completed(index) = change {
                self.ended.retain(|(known, _)| known != index);
                self.ended.push((*index, Instant::now()));
            }
        }
        self.redraw(state)
    }

    pub(super) fn redraw(&mut self, state: &State) -> io::Result<()> {
        let settled: Vec<usize> = self
            .ended
            .iter()
            .filter(|(_, at)| at.elapsed() > SETTLED)
            .map(|(index, _)| *index)
            .collect();
        self.ended.retain(|(index, _)| !settled.contains(index));
        let above = lines_of(state, &settled);
        self.draw(state, &above)
    }

    pub(super) fn finish(&mut self, state: &State) -> io::Result<()> {
        let ended: Vec<usize> = self.ended.drain(..).map(|(index, _)| index).collect();
        let mut out = io::stderr().lock();
        self.clear(&mut out)?;
        for line in lines_of(state, &ended) {
            writeln!(out, "{line}")?;
        }
        out.flush()
    }

    fn clear(&mut self, out: &mut io::StderrLock<'_>) -> io::Result<()> {
        if self.drawn > 0 {
            out.queue(MoveUp(self.drawn))?;
        }
        out.queue(Clear(ClearType::FromCursorDown))?;
        self.drawn = 0;
        Ok(())
    }

    /// Writes `above` for good and redraws what is running.
    fn draw(&mut self, state: &State, above: &[String]) -> io::Result<()> {
        let mut out = io::stderr().lock();
        self.clear(&mut out)?;
        for line in above {
            writeln!(out, "{line}")?;
        }
        // A terminal that does not know its size says zero.
        let (width, height) = size()
            .ok()
            .filter(|(width, height)| *width > 0 && *height > 0)
            .unwrap_or((80, 24));
        let width = usize::from(width.max(20));
        let running: Vec<&Step> = state.steps.iter().filter(|step| step.is_running()).collect();
        let room = usize::from(height).saturating_sub(2);
        let details = room.saturating_sub(running.len()) / running.len().max(1);
        let mut lines = Vec::new();
        for step in &running {
            let time = format!("{:.1}s", step.elapsed().as_secs_f64());
            let name_width = width.saturating_sub(time.len() + 5);
            let name = cut(&step.name, name_width);
            let padding = " ".repeat(name_width.saturating_sub(name.chars().count()));
            lines.push(format!(" {} {name}{padding} {time}", "=>".cyan()));
            let open = step.statuses.iter().filter(|status| status.completed.is_none());
            let open = open.map(|status| format!("{}{}", status.id, amount(status)));
            let said: Vec<String> = open.chain(step.tail.iter().cloned()).collect();
            let from = said.len().saturating_sub(details);
            for line in said.get(from..).unwrap_or_default() {
                lines.push(format!("   {}", cut(line, width - 4)).dark_grey().to_string());
            }
        }
        lines.truncate(room);
        for line in &lines {
            queue!(out, Clear(ClearType::CurrentLine))?;
            writeln!(out, "{line}")?;
        }
        self.drawn = u16::try_from(lines.len()).unwrap_or(0);
        out.flush()
    }
}

/// What remains of steps that have ended. A failed one keeps what it said on the screen.
fn lines_of(state: &State, ended: &[usize]) -> Vec<String> {
    let mut lines = Vec::new();
    for step in ended
        .iter()
        .filter_map(|index| state.steps.get(*index))
        .filter(|step| step.completed.is_some())
    {
        lines.push(finished(step));
        if !step.error.is_empty() {
            lines.extend(
                step.tail
                    .iter()
                    .map(|line| format!("   {} {}", "|".dark_grey(), cut(line, 2000))),
            );
        }
    }
    lines
}

fn finished(step: &Step) -> String {
    let name = cut(&step.name, 500);
    let time = format!("{:.1}s", step.elapsed().as_secs_f64());
    if step.error.ends_with("context canceled") {
        format!(" {} {name}", "CANCELED".yellow())
    } else if !step.error.is_empty() {
        format!(" {} {name} {time}", "ERROR".red())
    } else if step.cached {
        format!(" {} {name}", "CACHED".blue())
    } else {
        format!(" {} {name} {}", "done".green(), time.dark_grey())
    }
}

/// The beginning of a text, without what moves a cursor, in at most `width` characters.
fn cut(text: &str, width: usize) -> String {
    let mut plain = String::new();
    let mut escape = false;
    for character in text.chars() {
        match character {
            '\u{1b}' => escape = true,
            character if escape => escape = !character.is_ascii_alphabetic(),
            character if character.is_control() => {}
            character => plain.push(character),
        }
    }
    if plain.chars().count() <= width {
        return plain;
    }
    let mut short: String = plain.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn cut_text_has_no_controls() {
        assert_eq!(cut("\u{1b}[31mred\u{1b}[0m\ttext", 40), "redtext");
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("größe", 5), "größe");
    }
}
