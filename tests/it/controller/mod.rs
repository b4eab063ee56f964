//! The controller against a real API server. `KubeVirt`, kubelets and agents are stand-ins: `scene`.

mod election;
mod endings;
mod life;
mod scene;
mod tenants;
mod waiting;
