//! Networks of IPv4 addresses.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network of IPv4 addresses: `10.1.2.0/24`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// The network that `address` is in. `prefix` is at most 32.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self { network: (u32::from(address) & mask(prefix)).into(), prefix }
    }

    /// Its first address, which nobody has.
    pub fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Length of the part that all its addresses have in common, in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The address so far behind the first.
    pub fn nth(self, nth: u32) -> Ipv4Addr {
        u32::from(self.network).wrapping_add(nth).into()
    }

    /// How many addresses there are for hosts; neither the first nor the last is one.
    pub fn hosts(self) -> u32 {
        (!mask(self.prefix)).saturating_sub(1)
    }

    /// Whether a host in it can have this address.
    pub fn has_host(self, address: Ipv4Addr) -> bool {
        let nth = u32::from(address).wrapping_sub(self.network.into());
        nth >= 1 && nth <= self.hosts()
    }

    /// Whether an address is in both.
    pub fn overlaps(self, other: Subnet) -> bool {
        let mask = mask(self.prefix.min(other.prefix));
        u32::from(self.network) & mask == u32::from(other.network) & mask
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no network such as 10.1.2.0/24");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        if address.parse::<Ipv6Addr>().is_ok() {
            return Err(format!("{text} is a network of IPv6; here are such of IPv4 only, as 10.1.2.0/24"));
        }
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or_else(wrong)?;
        Ok(Self::new(address, prefix))
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_know_their_hosts() {
        let small: Subnet = "10.1.2.9/30".parse().unwrap();
        assert_eq!((small.to_string(), small.hosts()), ("10.1.2.8/30".to_owned(), 2));
        let hosts: Vec<bool> = (0..4).map(|nth| small.has_host(small.nth(nth))).collect();
        assert_eq!(hosts, [false, true, true, false]);
        assert!(small.overlaps("10.1.0.0/16".parse().unwrap()));
        assert!(small.overlaps("0.0.0.0/0".parse().unwrap()));
        assert!(!small.overlaps("10.1.2.12/30".parse().unwrap()));
        for bad in ["10.1.2.0", "10.1.2.0/33", "10.1.2/24", "x/8", "10.0.0.0/-1"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        assert!("fd00::/64".parse::<Subnet>().unwrap_err().contains("IPv6"));
        assert_eq!("1.2.3.4/32".parse::<Subnet>().unwrap().hosts(), 0);
    }
}
