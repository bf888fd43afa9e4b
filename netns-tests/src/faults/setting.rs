//! What a run of the matrix is played in: who decides when the sites do not hear each other, and which way the machine
//! goes. It changes what a case meets, never which case a number is.

use gateway::config::ArbiterChoice;

use super::plan::Place;

/// Which way the machine moves in every case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Leg {
    /// From its home, site a, to site b.
    #[default]
    Away,
    /// From site b, where it has moved before, home to site a.
    Home,
}

/// What a run is played in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Setting {
    /// The register of both sites. With one, a cut is a cut between the gateways alone: both still reach the register.
    pub arbiter: ArbiterChoice,
    /// Which way the machine moves.
    pub leg: Leg,
}

impl Setting {
    /// The name of the site that a place of the plan is.
    pub fn site(self, place: Place) -> &'static str {
        match (self.leg, place) {
            (Leg::Away, Place::A) | (Leg::Home, Place::B) => "a",
            (Leg::Away, Place::B) | (Leg::Home, Place::A) => "b",
        }
    }

    /// The command's arguments for it, with a space before each; nothing for what is usual.
    pub fn arguments(self) -> String {
        let arbiter = match self.arbiter {
            ArbiterChoice::None => "",
            ArbiterChoice::Dns => " --arbiter dns",
            ArbiterChoice::Etcd => " --arbiter etcd",
        };
        let leg = match self.leg {
            Leg::Away => "",
            Leg::Home => " --leg home",
        };
        format!("{arbiter}{leg}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn on_the_way_home_the_sites_change_places_and_the_command_says_so() {
        let usual = Setting::default();
        assert_eq!((usual.site(Place::A), usual.site(Place::B), usual.arguments().as_str()), ("a", "b", ""));
        let home = Setting { arbiter: ArbiterChoice::Dns, leg: Leg::Home };
        assert_eq!((home.site(Place::A), home.site(Place::B)), ("b", "a"));
        assert_eq!(home.arguments(), " --arbiter dns --leg home");
    }
}
