//! What a process finds around it that is no mount of the build: `/etc/hosts`, `/etc/resolv.conf`, proxy variables.

use std::net::IpAddr;

use kiln_llb::op::{HostIp, ProxyEnv};

/// Name servers that replace the host's (`[dns]` of the daemon's configuration).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DnsSettings {
    /// `nameserver` lines; empty keeps the host's.
    pub nameservers: Vec<String>,
    /// `options`; empty keeps the host's.
    pub options: Vec<String>,
    /// `search`; empty keeps the host's.
    pub search_domains: Vec<String>,
}

impl DnsSettings {
    fn is_empty(&self) -> bool {
        *self == DnsSettings::default()
    }
}

const HOST_FILE: &str = "/etc/resolv.conf";
/// Where systemd-resolved keeps the servers behind its stub on 127.0.0.53.
const RESOLVED_FILE: &str = "/run/systemd/resolve/resolv.conf";
/// When nothing else is left: Google's public resolvers, as the field does.
const PUBLIC: [&str; 4] = ["8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"];

/// The content of `/etc/resolv.conf`. Reads the host's file anew each time, so that changes reach the next step.
pub(crate) fn resolv_conf(dns: &DnsSettings, host_network: bool) -> String {
    let host = std::fs::read_to_string(HOST_FILE).unwrap_or_default();
    let resolved = || std::fs::read_to_string(RESOLVED_FILE).ok();
    make_resolv_conf(&host, resolved, dns, host_network)
}

fn make_resolv_conf(
    host: &str,
    resolved: impl FnOnce() -> Option<String>,
    dns: &DnsSettings,
    host_network: bool,
) -> String {
    if host_network && dns.is_empty() {
        return host.to_owned();
    }
    let mut text = host.to_owned();
    if !host_network && servers(host) == ["127.0.0.53"] {
        text = resolved().unwrap_or(text);
    }
    let or_own = |own: &[String], found: Vec<&str>| -> Vec<String> {
        if own.is_empty() {
            found.into_iter().map(str::to_owned).collect()
        } else {
            own.to_vec()
        }
    };
    let mut nameservers = or_own(&dns.nameservers, servers(&text));
    let search = or_own(&dns.search_domains, words(&text, "search"));
    let options = or_own(&dns.options, words(&text, "options"));
    if !host_network {
        nameservers.retain(|s| !is_loopback(s));
        if nameservers.is_empty() {
            nameservers = PUBLIC.iter().map(|s| (*s).to_owned()).collect();
        }
    }
    let mut out = String::new();
    if !search.is_empty() {
        out.push_str(&format!("search {}\n", search.join(" ")));
    }
    for server in nameservers {
        out.push_str(&format!("nameserver {server}\n"));
    }
    if !options.is_empty() {
        out.push_str(&format!("options {}\n", options.join(" ")));
    }
    out
}

fn servers(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|l| l.trim().strip_prefix("nameserver")?.split_whitespace().next())
        .collect()
}

/// The words of the last line that begins with `key` (resolv.conf(5): the last counts).
fn words<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    let line = text
        .lines()
        .rev()
        .find_map(|l| l.trim().strip_prefix(key).filter(|r| r.starts_with([' ', '\t'])));
    line.map(|l| l.split_whitespace().collect()).unwrap_or_default()
}

fn is_loopback(server: &str) -> bool {
    let address = server.split('%').next().unwrap_or(server);
    address.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The content of `/etc/hosts`.
pub(crate) fn hosts(hostname: &str, extra: &[HostIp]) -> String {
    let mut out = format!("127.0.0.1\tlocalhost {hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for host in extra {
        out.push_str(&format!("{}\t{}\n", host.ip, host.host));
    }
    out
}

/// Proxy settings as environment variables, in both spellings.
pub(crate) fn proxy_variables(proxy: &ProxyEnv) -> Vec<String> {
    let settings = [
        ("HTTP_PROXY", &proxy.http_proxy),
        ("HTTPS_PROXY", &proxy.https_proxy),
        ("FTP_PROXY", &proxy.ftp_proxy),
        ("NO_PROXY", &proxy.no_proxy),
        ("ALL_PROXY", &proxy.all_proxy),
    ];
    let mut out = Vec::new();
    for (name, value) in settings.into_iter().filter(|(_, value)| !value.is_empty()) {
        out.push(format!("{name}={value}"));
        out.push(format!("{}={value}", name.to_lowercase()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(host: &str, dns: &DnsSettings, host_network: bool) -> String {
        make_resolv_conf(
            host,
            || Some("nameserver 10.0.0.1\nsearch up.example\n".to_owned()),
            dns,
            host_network,
        )
    }

    #[test]
    fn resolvers_by_network() {
        let none = DnsSettings::default();
        let host = "# mine\nnameserver 127.0.0.1\nnameserver 192.0.2.1\nsearch a b\noptions ndots:2\n";
        assert_eq!(make(host, &none, true), host);
        assert_eq!(
            make(host, &none, false),
            "search a b\nnameserver 192.0.2.1\noptions ndots:2\n"
        );
        assert_eq!(
            make("nameserver 127.0.0.53\n", &none, false),
            "search up.example\nnameserver 10.0.0.1\n"
        );
        assert!(make("nameserver ::1\n", &none, false).starts_with("nameserver 8.8.8.8\nnameserver 8.8.4.4\n"));
        let own = DnsSettings {
            nameservers: vec!["9.9.9.9".into()],
            ..none
        };
        assert_eq!(
            make(host, &own, true),
            "search a b\nnameserver 9.9.9.9\noptions ndots:2\n"
        );
    }

    #[test]
    fn hosts_and_proxies() {
        let extra = [HostIp {
            host: "db".into(),
            ip: "192.0.2.7".into(),
        }];
        let expected = "127.0.0.1\tlocalhost me\n::1\tlocalhost ip6-localhost ip6-loopback\n192.0.2.7\tdb\n";
        assert_eq!(hosts("me", &extra), expected);
        let proxy = ProxyEnv {
            http_proxy: "http://p".into(),
            no_proxy: "x".into(),
            ..ProxyEnv::default()
        };
        assert_eq!(
            proxy_variables(&proxy),
            ["HTTP_PROXY=http://p", "http_proxy=http://p", "NO_PROXY=x", "no_proxy=x"]
        );
    }
}
