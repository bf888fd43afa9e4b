//! A tunnel that changes nothing on the host and writes down what it is asked for. For tests.

use longhaul_core::tunnel::handover::FlowTuple;
use longhaul_core::tunnel::host::HostAddresses;
use longhaul_core::tunnel::policy::PortKey;
use tokio::sync::{mpsc, watch};

use super::control::{Command, Since};
use super::mover::TunnelStatus;
use super::{COMMANDS, Tunnel, TunnelError};

type Sampled = Result<Vec<FlowTuple>, TunnelError>;

impl Tunnel {
    /// Everything that it is asked for succeeds.
    pub(crate) fn noted() -> (Self, watch::Receiver<Vec<String>>) {
        Self::noted_with(|_| Ok(Vec::new()))
    }

    /// The same, and this is what it has sampled.
    pub(crate) fn noted_with(
        sample: impl Fn(&PortKey) -> Sampled + Send + 'static,
    ) -> (Self, watch::Receiver<Vec<String>>) {
        let (commands, mut asked_for) = mpsc::channel(COMMANDS);
        let (note, noted) = watch::channel(Vec::new());
        let (publish, status) = watch::channel(TunnelStatus::default());
        let (show, conflicts) = watch::channel(Vec::new());
        tokio::spawn(async move {
            while let Some(command) = asked_for.recv().await {
                let text = text(&command);
                note.send_modify(|noted| noted.push(text));
                answer(command, &sample);
            }
            drop((publish, show));
        });
        (Self { commands, status, conflicts }, noted)
    }
}

fn text(command: &Command) -> String {
    let (what, whose) = match command {
        Command::AddPeer { site, .. } => ("add_peer", site.to_string()),
        Command::CreateTap { key, .. } => ("create_tap", key.to_string()),
        Command::RemoveTap { key, .. } => ("remove_tap", key.to_string()),
        Command::SampleBegin { key, .. } => ("sample_begin", key.to_string()),
        Command::Sample { key, .. } => ("sample", key.to_string()),
        Command::SampleEnd { key, .. } => ("sample_end", key.to_string()),
        Command::HomeNeighbours { lan, .. } => ("home_neighbours", lan.clone()),
        Command::SolicitRouters { lan, .. } => ("solicit_routers", lan.clone()),
        Command::HostAddresses { .. } => ("host_addresses", String::new()),
        Command::HoldBegin { request, .. } => ("hold_begin", request.key.to_string()),
        Command::HoldEndAttract { key, since: Since::JustNow, .. } => ("hold_end_attract", key.to_string()),
        Command::HoldEndAttract { key, since: Since::Earlier { quiet }, .. } => {
            ("attract_again", format!("{key} after {} s", quiet.as_secs()))
        }
        Command::HoldUndo { request, .. } => ("hold_undo", request.key.to_string()),
        Command::NamesExpire { key, .. } => ("names_expire", key.to_string()),
        Command::AttractEnd { key, .. } => ("attract_end", key.to_string()),
        Command::LetGo { request, .. } => ("let_go", request.key.to_string()),
        Command::Retarget { key, .. } => ("retarget", key.to_string()),
        Command::ExpectReturn { key, .. } => ("expect_return", key.to_string()),
        Command::ComeBack { key, .. } => ("come_back", key.to_string()),
        Command::CarryPrepare { request, .. } => ("carry_prepare", request.key.to_string()),
        Command::Carry { request, .. } => ("carry", request.key.to_string()),
        Command::CarryUndo { key, .. } => ("carry_undo", key.to_string()),
        Command::ForgetAddress { key, address, .. } => ("forget_address", format!("{key} {address}")),
        Command::PeerRestarted { site, .. } => ("peer_restarted", site.to_string()),
        Command::Flows { key, .. } => ("flows", key.to_string()),
        Command::VisitPrepare { request, .. } => ("visit_prepare", request.key.to_string()),
        Command::VisitFlows { key, .. } => ("visit_flows", key.to_string()),
        Command::VisitResumed { key, .. } => ("visit_resumed", key.to_string()),
        Command::VisitUndo { key, .. } => ("visit_undo", key.to_string()),
        Command::UndoAll { .. } => ("undo_all", String::new()),
        Command::Stop { .. } => ("stop", String::new()),
    };
    format!("{what} {whose}")
}

/// Who asked may have gone.
fn answer(command: Command, sample: &impl Fn(&PortKey) -> Sampled) {
    match command {
        Command::CreateTap { key, reply, .. } => drop(reply.send(Ok(key.to_string()))),
        Command::Sample { key, reply } => drop(reply.send(sample(&key))),
        Command::HomeNeighbours { reply, .. } => drop(reply.send(Ok(Vec::new()))),
        Command::HostAddresses { reply, .. } => drop(reply.send(Ok(HostAddresses::default()))),
        // Nothing was attracted here.
        Command::AttractEnd { key, reply } => drop(reply.send(Err(TunnelError::Returning(key)))),
        Command::Flows { reply, .. } => drop(reply.send(Err(TunnelError::Stopped))),
        Command::SolicitRouters { asked, reply, .. } => {
            let _ = asked.send(());
            drop(reply.send(Ok(())));
        }
        Command::AddPeer { reply, .. }
        | Command::RemoveTap { reply, .. }
        | Command::SampleBegin { reply, .. }
        | Command::SampleEnd { reply, .. }
        | Command::HoldBegin { reply, .. }
        | Command::HoldEndAttract { reply, .. }
        | Command::HoldUndo { reply, .. }
        | Command::NamesExpire { reply, .. }
        | Command::LetGo { reply, .. }
        | Command::Retarget { reply, .. }
        | Command::ExpectReturn { reply, .. }
        | Command::ComeBack { reply, .. }
        | Command::CarryPrepare { reply, .. }
        | Command::Carry { reply, .. }
        | Command::CarryUndo { reply, .. }
        | Command::ForgetAddress { reply, .. }
        | Command::PeerRestarted { reply, .. }
        | Command::VisitPrepare { reply, .. }
        | Command::VisitFlows { reply, .. }
        | Command::VisitResumed { reply, .. }
        | Command::VisitUndo { reply, .. }
        | Command::UndoAll { reply }
        | Command::Stop { reply } => drop(reply.send(Ok(()))),
    }
}
