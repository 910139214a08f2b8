//! EXPOSE: port specifications as users write them.

use std::net::IpAddr;

use super::dispatch::Step;
use super::{Bridge, Conversion};
use crate::dockerfile::lint;
use crate::error::DockerfileError;
use crate::gotext::{parse_int, plain_list, quote};
use crate::image::Empty;

/// A specification after parsing.
#[derive(Debug, PartialEq, Eq)]
struct Spec {
    /// First and last port.
    range: (u16, u16),
    protocol: String,
    /// Whether an address or a port of the host was given, which means nothing here.
    mapped: bool,
}

impl<B: Bridge> Conversion<'_, B> {
    pub(super) fn expose(&mut self, step: &Step<'_>, ports: &[String]) -> Result<(), DockerfileError> {
        let mut specs = Vec::new();
        for port in ports {
            // An unset variable is no reason to complain here, it may well stand for nothing.
            let words = self.expander().expand(port, self.env_of(step.stage))?.words;
            specs.extend(words);
        }
        let mut shown = Vec::new();
        for text in &specs {
            let spec = parse(text, |protocol, mapped| {
                let span = step.instruction.span;
                if protocol != protocol.to_lowercase() {
                    step.lint.report(&lint::EXPOSE_PROTO_CASING, span, || {
                        format!("Defined protocol '{text}' in EXPOSE instruction should be lowercase")
                    });
                }
                if mapped {
                    step.lint.report(&lint::EXPOSE_INVALID_FORMAT, span, || {
                        let what = "should not define an IP address or host-port mapping";
                        format!("EXPOSE instruction {what}, found '{text}'")
                    });
                }
            })
            .map_err(DockerfileError::new)?;
            self.budget.charge(usize::from(spec.range.1 - spec.range.0) * 16)?;
            shown.extend((spec.range.0..=spec.range.1).map(|port| format!("{port}/{}", spec.protocol)));
        }
        let text = format!("EXPOSE {}", plain_list(&shown));
        let known = &mut self.table.stages[step.stage].image.config.exposed_ports;
        known.extend(shown.into_iter().map(|port| (port, Empty {})));
        self.commit(step.stage, text, false)
    }
}

/// Parses `[ip:][host:]port[-end][/protocol]`. `look` sees protocol and mapping before anything else is checked.
fn parse(text: &str, look: impl FnOnce(&str, bool)) -> Result<Spec, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (ip, host, container) = match parts.as_slice() {
        [container] => (String::new(), "", *container),
        [host, container] => (String::new(), *host, *container),
        [ip @ .., host, container] => (ip.join(":"), *host, *container),
        [] => (String::new(), "", ""),
    };
    let invalid = |why: String| format!("invalid port: {}: {why}", quote(text));
    let (port, protocol) = container.split_once('/').unwrap_or((container, ""));
    if port.is_empty() {
        return Err(invalid("no port specified".to_owned()));
    }
    let protocol = if protocol.is_empty() { "tcp" } else { protocol };
    if !matches!(protocol.to_lowercase().as_str(), "tcp" | "udp" | "sctp") {
        return Err(invalid(format!("invalid proto: {protocol}")));
    }
    let mapped = !ip.is_empty() || !host.is_empty();
    look(protocol, mapped);
    let address = match ip.strip_prefix('[') {
        Some(rest) => match rest.strip_suffix(']') {
            Some(inner) => inner,
            None => {
                return Err(format!(
                    "invalid IP address {ip}: address {ip}:: missing ']' in address"
                ));
            }
        },
        None => &ip,
    };
    if !ip.is_empty() && address.parse::<IpAddr>().is_err() {
        return Err(format!("invalid IP address: {address}"));
    }
    let range = port_range(port).ok_or_else(|| format!("invalid containerPort: {port}"))?;
    if !host.is_empty() {
        let on_host = port_range(host).ok_or_else(|| format!("invalid hostPort: {host}"))?;
        if range.1 - range.0 != on_host.1 - on_host.0 && range.0 != range.1 {
            return Err(format!(
                "invalid ranges specified for container and host Ports: {port} and {host}"
            ));
        }
    }
    Ok(Spec {
        range,
        protocol: protocol.to_lowercase(),
        mapped,
    })
}

fn port_range(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| u16::try_from(parse_int(text, 0, 65535).ok()?).ok();
    let (start, end) = match text.split_once('-') {
        Some((start, end)) => (number(start)?, number(end)?),
        None => (number(text)?, number(text)?),
    };
    (start <= end).then_some((start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifications() {
        let spec = |text: &str| parse(text, |_, _| {}).map(|s| (s.range, s.protocol, s.mapped));
        assert_eq!(spec("80"), Ok(((80, 80), "tcp".into(), false)));
        assert_eq!(spec("80-82/UDP"), Ok(((80, 82), "udp".into(), false)));
        assert_eq!(spec("1.2.3.4:81:80/sctp"), Ok(((80, 80), "sctp".into(), true)));
        assert_eq!(spec("[::1]:81:80").map(|s| s.2), Ok(true));
        assert_eq!(spec("80-82:80"), Ok(((80, 80), "tcp".into(), true)));
        for (text, message) in [
            ("70000", "invalid containerPort: 70000"),
            ("82-80", "invalid containerPort: 82-80"),
            ("80/foo", "invalid port: \"80/foo\": invalid proto: foo"),
            ("/tcp", "invalid port: \"/tcp\": no port specified"),
            ("x:1:80", "invalid IP address: x"),
            ("x:80", "invalid hostPort: x"),
            (
                "80-82:90-91",
                "invalid ranges specified for container and host Ports: 90-91 and 80-82",
            ),
        ] {
            assert_eq!(spec(text).unwrap_err(), message, "{text}");
        }
    }
}
