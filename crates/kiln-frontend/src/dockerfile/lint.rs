//! Lint: the catalogue of rules, which of them are in force, and what they found.

use std::collections::BTreeSet;
use std::sync::Mutex;

use super::directive;
use super::span::Span;
use crate::error::DockerfileError;
use crate::gotext::{parse_bool, quote};

/// One rule of the catalogue.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, as in options and messages.
    pub name: &'static str,
    /// What it is about.
    pub description: &'static str,
    /// Last part of the address of its documentation; empty for none.
    page: &'static str,
    /// Runs only when asked for by name, or with all experimental ones.
    pub experimental: bool,
}

impl Rule {
    /// Address of its documentation; may be empty.
    pub fn url(&self) -> String {
        match self.page {
            "" => String::new(),
            page => format!("https://docs.docker.com/go/dockerfile/rule/{page}/"),
        }
    }
}

macro_rules! rules {
    ($($ident:ident $name:literal $page:literal $experimental:literal $description:literal;)*) => {
        $(
            #[doc = $description]
            pub static $ident: Rule =
                Rule { name: $name, description: $description, page: $page, experimental: $experimental };
        )*
        /// Every rule.
        pub static RULES: &[&Rule] = &[$(&$ident),*];
    };
}

rules! {
    STAGE_NAME_CASING "StageNameCasing" "stage-name-casing" false "Stage names should be lowercase";
    FROM_AS_CASING "FromAsCasing" "from-as-casing" false
        "The 'as' keyword should match the case of the 'from' keyword";
    NO_EMPTY_CONTINUATION "NoEmptyContinuation" "no-empty-continuation" false
        "Empty continuation lines will become errors in a future release";
    CONSISTENT_INSTRUCTION_CASING "ConsistentInstructionCasing" "consistent-instruction-casing" false
        "All commands within the Dockerfile should use the same casing (either upper or lower)";
    DUPLICATE_STAGE_NAME "DuplicateStageName" "duplicate-stage-name" false "Stage names should be unique";
    RESERVED_STAGE_NAME "ReservedStageName" "reserved-stage-name" false
        "Reserved words should not be used as stage names";
    JSON_ARGS_RECOMMENDED "JSONArgsRecommended" "json-args-recommended" false
        "JSON arguments recommended for ENTRYPOINT/CMD to prevent unintended behavior related to OS signals";
    MAINTAINER_DEPRECATED "MaintainerDeprecated" "maintainer-deprecated" false
        "The MAINTAINER instruction is deprecated, use a label instead to define an image author";
    UNDEFINED_ARG_IN_FROM "UndefinedArgInFrom" "undefined-arg-in-from" false "FROM command must use declared ARGs";
    WORKDIR_RELATIVE_PATH "WorkdirRelativePath" "workdir-relative-path" false
        "Relative workdir without an absolute workdir declared within the build can have unexpected results if the base image changes";
    UNDEFINED_VAR "UndefinedVar" "undefined-var" false "Variables should be defined before their use";
    MULTIPLE_INSTRUCTIONS_DISALLOWED "MultipleInstructionsDisallowed" "multiple-instructions-disallowed" false
        "Multiple instructions of the same type should not be used in the same stage";
    LEGACY_KEY_VALUE_FORMAT "LegacyKeyValueFormat" "legacy-key-value-format" false
        "Legacy key/value format with whitespace separator should not be used";
    INVALID_BASE_IMAGE_PLATFORM "InvalidBaseImagePlatform" "" false
        "Base image platform does not match expected target platform";
    REDUNDANT_TARGET_PLATFORM "RedundantTargetPlatform" "redundant-target-platform" false
        "Setting platform to predefined $TARGETPLATFORM in FROM is redundant as this is the default behavior";
    SECRETS_USED_IN_ARG_OR_ENV "SecretsUsedInArgOrEnv" "secrets-used-in-arg-or-env" false
        "Sensitive data should not be used in the ARG or ENV commands";
    INVALID_DEFAULT_ARG_IN_FROM "InvalidDefaultArgInFrom" "invalid-default-arg-in-from" false
        "Default value for global ARG results in an empty or invalid base image name";
    FROM_PLATFORM_FLAG_CONST_DISALLOWED "FromPlatformFlagConstDisallowed" "from-platform-flag-const-disallowed" false
        "FROM --platform flag should not use a constant value";
    COPY_IGNORED_FILE "CopyIgnoredFile" "copy-ignored-file" false
        "Attempting to Copy file that is excluded by .dockerignore";
    INVALID_DEFINITION_DESCRIPTION "InvalidDefinitionDescription" "invalid-definition-description" true
        "Comment for build stage or argument should follow the format: `# <arg/stage name> <description>`. If this is not intended to be a description comment, add an empty line or comment between the instruction and the comment.";
    EXPOSE_PROTO_CASING "ExposeProtoCasing" "expose-proto-casing" false
        "Protocol in EXPOSE instruction should be lowercase";
    EXPOSE_INVALID_FORMAT "ExposeInvalidFormat" "expose-invalid-format" false
        "IP address and host-port mapping should not be used in EXPOSE instruction. This will become an error in a future release";
}

/// Which rules are in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LintOptions {
    skip_all: bool,
    skip: BTreeSet<String>,
    experimental_all: bool,
    experimental: BTreeSet<String>,
    /// Any finding fails the build.
    pub error: bool,
}

impl LintOptions {
    /// Reads `skip=A,B;experimental=all;error=true`. Rule names are not checked.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut options = Self::default();
        let text = text.trim();
        if text.is_empty() {
            return Ok(options);
        }
        for part in text.splitn(3, ';') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("invalid check option {}", quote(part)))?;
            let names = || value.trim().split(',').map(|name| name.trim().to_owned()).collect();
            match key.trim() {
                "skip" if value.trim() == "all" => options.skip_all = true,
                "skip" => options.skip = names(),
                "experimental" if value.trim() == "all" => options.experimental_all = true,
                "experimental" => options.experimental = names(),
                "error" => {
                    options.error = parse_bool(value.trim()).ok_or_else(|| {
                        let number = crate::gotext::number_error("ParseBool", value.trim(), false);
                        format!("failed to parse check option {}: {number}", quote(part))
                    })?;
                }
                key => return Err(format!("invalid check option {}", quote(key))),
            }
        }
        Ok(options)
    }

    fn allows(&self, rule: &Rule) -> bool {
        if rule.experimental {
            self.experimental_all || self.experimental.contains(rule.name)
        } else {
            !self.skip_all && !self.skip.contains(rule.name)
        }
    }
}

/// Something a rule found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The rule.
    pub rule: &'static Rule,
    /// The message, without the rule's name.
    pub message: String,
    /// Where.
    pub span: Span,
}

impl Finding {
    /// The line that clients show: `Rule: message (line N)`.
    pub fn short(&self) -> String {
        match self.span.first() {
            Some(line) if line > 0 => format!("{}: {} (line {line})", self.rule.name, self.message),
            _ => format!("{}: {}", self.rule.name, self.message),
        }
    }
}

/// Collects findings of the rules in force.
#[derive(Debug, Default)]
pub struct Linter {
    options: Option<LintOptions>,
    findings: Mutex<Vec<Finding>>,
}

impl Linter {
    /// A linter with these options.
    pub fn new(options: LintOptions) -> Self {
        Self {
            options: Some(options),
            findings: Mutex::default(),
        }
    }

    /// A linter that reports nothing, for the platforms after the first.
    pub fn silent() -> Self {
        Self::default()
    }

    /// Rules in force for an instruction: a comment of the form `check=…` before it adds to the options.
    pub fn scope(&self, comments: &[String]) -> LintScope<'_> {
        let mut extra = None;
        if self.options.is_some() {
            let check = comments
                .iter()
                .filter_map(|comment| directive::name_and_value(comment.as_bytes()))
                .find(|(name, _)| name == "check");
            if let Some((_, value)) = check {
                extra = LintOptions::parse(value.split(' ').next().unwrap_or_default()).ok();
            }
        }
        LintScope { linter: self, extra }
    }

    /// Reports what is not tied to one instruction's comments.
    pub fn report(&self, rule: &'static Rule, span: Span, message: impl FnOnce() -> String) {
        self.scope(&[]).report(rule, span, message);
    }

    /// Everything found so far.
    pub fn findings(&self) -> Vec<Finding> {
        self.findings.lock().map(|f| f.clone()).unwrap_or_default()
    }

    /// The failure that findings are, if the options say so.
    pub fn failure(&self) -> Result<(), DockerfileError> {
        let findings = self.findings();
        if findings.is_empty() || !self.options.as_ref().is_some_and(|o| o.error) {
            return Ok(());
        }
        let names: BTreeSet<&str> = findings.iter().map(|f| f.rule.name).collect();
        let names: Vec<&str> = names.into_iter().collect();
        Err(DockerfileError::new(format!(
            "lint violation found for rules: {}",
            names.join(", ")
        )))
    }
}

/// The rules in force for one instruction.
#[derive(Debug)]
pub struct LintScope<'a> {
    linter: &'a Linter,
    extra: Option<LintOptions>,
}

impl LintScope<'_> {
    /// Records a finding if `rule` is in force here; only then is the message made.
    pub fn report(&self, rule: &'static Rule, span: Span, message: impl FnOnce() -> String) {
        let Some(options) = &self.linter.options else { return };
        let allowed = match &self.extra {
            None => options.allows(rule),
            Some(extra) if rule.experimental => options.allows(rule) || extra.allows(rule),
            Some(extra) => options.allows(rule) && extra.allows(rule),
        };
        if allowed && let Ok(mut findings) = self.linter.findings.lock() {
            findings.push(Finding {
                rule,
                message: message(),
                span,
            });
        }
    }
}

/// Whether a variable's name sounds like a secret: one of its parts is a word for one, and none says it is harmless.
pub(crate) fn sounds_secret(name: &str) -> bool {
    const SECRET: &[&str] = &[
        "apikey",
        "auth",
        "credential",
        "credentials",
        "key",
        "password",
        "pword",
        "passwd",
        "secret",
        "token",
    ];
    const HARMLESS: &[&str] = &["public", "file", "version"];
    let has = |words: &[&str]| {
        name.split('_')
            .any(|part| words.iter().any(|word| part.eq_ignore_ascii_case(word)))
    };
    has(SECRET) && !has(HARMLESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_their_errors() {
        let options = LintOptions::parse(" skip = A, B ;experimental=all;error=true").unwrap();
        assert!(options.error && options.experimental_all);
        assert_eq!(options.skip, BTreeSet::from(["A".to_owned(), "B".to_owned()]));
        assert_eq!(
            LintOptions::parse("foo"),
            Err("invalid check option \"foo\"".to_owned())
        );
        assert_eq!(
            LintOptions::parse("foo=1"),
            Err("invalid check option \"foo\"".to_owned())
        );
        assert_eq!(
            LintOptions::parse("error=x").unwrap_err(),
            "failed to parse check option \"error=x\": strconv.ParseBool: parsing \"x\": invalid syntax"
        );
    }

    #[test]
    fn comments_widen_the_options() {
        let linter = Linter::new(LintOptions::parse("skip=StageNameCasing").unwrap());
        let hit = |scope: &LintScope<'_>, rule| scope.report(rule, Span::line(3), || "m".to_owned());
        hit(&linter.scope(&[]), &STAGE_NAME_CASING);
        hit(&linter.scope(&[]), &INVALID_DEFINITION_DESCRIPTION);
        let here = linter.scope(&["x".into(), "check=skip=UndefinedVar;experimental=all".into()]);
        hit(&here, &UNDEFINED_VAR);
        hit(&here, &FROM_AS_CASING);
        hit(&here, &INVALID_DEFINITION_DESCRIPTION);
        hit(&linter.scope(&[]), &UNDEFINED_VAR);
        let names: Vec<_> = linter.findings().iter().map(Finding::short).collect();
        assert_eq!(
            names,
            [
                "FromAsCasing: m (line 3)",
                "InvalidDefinitionDescription: m (line 3)",
                "UndefinedVar: m (line 3)"
            ]
        );
        assert!(linter.failure().is_ok());
    }

    #[test]
    fn skip_all_leaves_experimental_rules_alone() {
        let linter = Linter::new(LintOptions::parse("skip=all;experimental=all;error=true").unwrap());
        linter.report(&UNDEFINED_VAR, Span::line(1), String::new);
        linter.report(&INVALID_DEFINITION_DESCRIPTION, Span::line(1), String::new);
        assert_eq!(linter.findings().len(), 1);
        assert_eq!(
            linter.failure().unwrap_err().message(),
            "lint violation found for rules: InvalidDefinitionDescription"
        );
    }

    #[test]
    fn names_that_sound_secret() {
        for name in ["TOKEN", "my_api_key", "DB_PASSWORD", "AUTH_x", "apikey"] {
            assert!(sounds_secret(name), "{name}");
        }
        for name in [
            "my-token",
            "TOKENX",
            "keyboard",
            "PUBLIC_KEY",
            "KEY_FILE",
            "token_version",
            "PATH",
        ] {
            assert!(!sounds_secret(name), "{name}");
        }
    }
}
