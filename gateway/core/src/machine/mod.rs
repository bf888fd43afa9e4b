//! Placeholder.
#![allow(missing_docs)]
use crate::ids::VmName;
use serde::{Deserialize, Serialize};
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineDefinition {
    pub name: VmName,
}
