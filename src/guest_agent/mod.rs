//! guest_agent
