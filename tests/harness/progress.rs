//! The steps of a build as `--progress=plain` prints them.

/// One step: everything buildx printed with the same `#number`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Step {
    /// The number buildx gave it.
    pub number: u32,
    /// Its name, `[build 2/3] RUN make`.
    pub name: String,
    /// Whether it came from the cache.
    pub cached: bool,
    /// Whether it ran to a good end.
    pub done: bool,
    /// Seconds it took, if it was done.
    pub seconds: Option<f64>,
    /// What went wrong.
    pub error: Option<String>,
    /// Lines of output and status, without times.
    pub log: Vec<String>,
}

/// All steps of one build, in the order of their numbers.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// The steps.
    pub steps: Vec<Step>,
}

impl Progress {
    /// Reads the plain output; lines that belong to no step are passed over.
    pub fn parse(text: &str) -> Progress {
        let mut progress = Progress::default();
        for line in text.lines() {
            let Some((number, rest)) = line.strip_prefix('#').and_then(|line| line.split_once(' ')) else {
                continue;
            };
            let Ok(number) = number.parse::<u32>() else { continue };
            let index = progress.steps.iter().position(|step| step.number == number);
            let Some(index) = index else {
                progress.steps.push(Step {
                    number,
                    name: rest.to_owned(),
                    ..Step::default()
                });
                continue;
            };
            let Some(step) = progress.steps.get_mut(index) else {
                continue;
            };
            if rest == "CACHED" {
                step.cached = true;
                step.done = true;
            } else if let Some(seconds) = rest.strip_prefix("DONE ") {
                step.done = true;
                step.seconds = seconds.trim_end_matches('s').parse().ok();
            } else if let Some(error) = rest.strip_prefix("ERROR: ") {
                step.error = Some(error.to_owned());
            } else if rest == "CANCELED" {
                step.error = Some(rest.to_owned());
            } else if rest != step.name && rest != "..." {
                let text = match rest.split_once(' ') {
                    Some((time, text)) if time.parse::<f64>().is_ok() => text,
                    _ => rest,
                };
                step.log.push(text.to_owned());
            }
        }
        progress
    }

    /// The first step whose name contains `part`.
    pub fn find(&self, part: &str) -> Option<&Step> {
        self.steps.iter().find(|step| step.name.contains(part))
    }

    /// The first step whose name contains `part`.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn step(&self, part: &str) -> &Step {
        self.find(part)
            .unwrap_or_else(|| panic!("no step is called {part:?}, but {:#?}", self.names()))
    }

    /// Whether the step whose name contains `part` came from the cache.
    #[track_caller]
    pub fn cached(&self, part: &str) -> bool {
        self.step(part).cached
    }

    /// Names of all steps of stages, `[stage 1/2] RUN x`, that ran and did not come from the cache. A step that asks a source
    /// has the name of the step that uses the answer; if that one is cached, nothing was executed.
    pub fn executed(&self) -> Vec<&str> {
        let work = |step: &&Step| {
            let inside = step
                .name
                .strip_prefix('[')
                .and_then(|name| name.split(']').next())
                .unwrap_or_default();
            let numbered = inside
                .split_whitespace()
                .last()
                .is_some_and(|word| word.contains('/') && !inside.starts_with("internal"));
            numbered
                && !step.name.contains("] FROM ")
                && !self.steps.iter().any(|other| other.name == step.name && other.cached)
        };
        self.steps.iter().filter(work).map(|step| step.name.as_str()).collect()
    }

    /// Names of all steps.
    pub fn names(&self) -> Vec<&str> {
        self.steps.iter().map(|step| step.name.as_str()).collect()
    }

    /// All output of steps.
    pub fn log(&self) -> String {
        self.steps
            .iter()
            .flat_map(|step| step.log.iter())
            .fold(String::new(), |mut all, line| {
                all.push_str(line);
                all.push('\n');
                all
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_output_becomes_steps() {
        let text = "#0 building with \"kiln\" instance using remote driver\n\n#1 [internal] load build definition\n#1 DONE 0.0s\n\n\
            #2 [build 1/2] FROM docker.io/library/busybox\n#2 CACHED\n\n#3 [build 2/2] RUN echo hi\n#3 0.123 hi\n#3 DONE 0.2s\n\n\
            #4 [stage-1 1/1] COPY a b\n#4 ERROR: no such file\n";
        let progress = Progress::parse(text);
        assert!(progress.cached("FROM docker.io"));
        assert_eq!(progress.step("RUN echo").log, ["hi"]);
        assert_eq!(progress.step("RUN echo").seconds, Some(0.2));
        assert_eq!(progress.step("COPY").error.as_deref(), Some("no such file"));
        assert_eq!(
            progress.executed(),
            ["[build 2/2] RUN echo hi", "[stage-1 1/1] COPY a b"]
        );
    }
}
