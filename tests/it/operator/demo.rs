//! What `make demo` shows of the operator. It prints, and it proves what it prints.

use super::{DISKS, OPERATOR, Operator, id, stream};
use crate::{
    bed::{flavour::Flavour, oracle::Replay, point_in_time::PointInTime},
    node::Launcher,
};
use serde_json::json;

fn say(text: &str) {
    println!("\n=== {text}");
}

/// Shows a command as a user types it, and what it prints.
fn show(operator: &Operator, arguments: &[&str]) {
    println!("$ kubectl {}", arguments.join(" "));
    print!("{}", operator.admin().run(arguments));
}

#[test]
#[ignore = "a demonstration: make demo"]
fn story() {
    say("A Kubernetes API server and etcd; two nodes, each with an agent; helm install virt-fleece");
    println!("(Real: API server, etcd, Helm, controller, agents, movers, S3 server, libvirt, QEMU, guest.");
    println!(" Stand-ins: kubelet and scheduler, which run movers as processes; KubeVirt's controllers, whose objects");
    println!(" are written by hand.)");
    let operator = Operator::start(&["node-a", "node-b"]);
    show(&operator, &["-n", OPERATOR, "get", "deploy,ds,sa"]);

    say("A secret and a BackupRepository in a bucket");
    operator.tenant("prod");
    show(&operator, &["-n", "prod", "get", "vfrepo"]);

    say("A KubeVirt VM boots on node-b: libvirt and QEMU as in a virt-launcher pod, with CentOS's driver allow-list");
    let launcher = Launcher::start(&operator.cluster, &operator.nodes[1], Flavour::Allowlist, ("prod", "web"), &DISKS);
    let stream = stream(2026);
    let mut writer = launcher.writer();
    let names: Vec<&str> = DISKS.iter().map(|disk| disk.name).collect();
    writer.start(&stream, 0, &names);
    println!("Its guest writes to both disks with four threads, at full speed, from here to the end.");
    let mut replay = Replay::new(&stream);
    let mut points = Vec::new();
    for (number, name) in ["web-full", "web-incremental"].into_iter().enumerate() {
        say(&format!("kubectl apply: VirtualMachineBackup {name}"));
        let before = writer.status();
        operator.back_up("prod", name, "web", &json!({}));
        let backup = operator.complete("prod", name);
        let after = writer.status();
        assert_eq!(backup["status"]["type"], ["Full", "Incremental"][number], "{backup:#}");
        println!(
            "$ kubectl -n prod wait --for=condition=Complete vfb/{name}\nvirtualmachinebackup/{name} condition met"
        );
        show(&operator, &["-n", "prod", "get", "vfb", name, "-o", "wide"]);
        let written: u64 = after.writes.iter().sum::<u64>() - before.writes.iter().sum::<u64>();
        println!("meanwhile the guest wrote {written} times");
        points.push((name, id(&backup), before.writes, after.writes));
    }
    show(&operator, &["-n", "prod", "get", "events"]);
    let done = writer.stop();
    assert_eq!(done.errors, 0, "the guest saw an error: {done:?}");
    assert_eq!(launcher.leftovers(), Vec::<String>::new(), "nothing is left in QEMU");

    say("A restore from the bucket and the passphrase alone, and the proof");
    for (name, id, before, after) in points {
        println!(
            "$ virt-fleece restore --repository s3://backups/prod/main --vm prod/web --backup {id} --output restored"
        );
        let images = operator.restored("prod", "web", &id);
        let found = PointInTime::find_after(&images, &replay).unwrap_or_else(|error| panic!("{name}: {error}"));
        found.assert_between(&before, &after);
        replay.advance_all(&found.numbers());
        println!(
            "{name}: every byte of both disks is as the guest had it at one instant, after writes {:?}",
            found.numbers()
        );
    }
}
