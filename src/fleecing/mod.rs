//! fleecing
