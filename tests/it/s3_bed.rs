//! The bed's S3 server does what the repository counts on, and the proxy before it what its tests count on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::{
    ClientOptions, Error, GetOptions, GetRange, ObjectStore, ObjectStoreExt as _, PutMode, PutPayload, RetryConfig,
    UpdateVersion, WriteMultipart,
};
use tempfile::TempDir;
use tokio::sync::Barrier;

use crate::bed::s3::{S3Server, client};
use crate::bed::s3_proxy::{Effect, Fault, S3Proxy, Stage};

/// The bucket of these tests.
const BUCKET: &str = "smoke";
/// When the client of the tests gives a request up.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A server with an empty bucket, and a proxy before it.
struct Scene {
    /// The proxy; before the server, to end first.
    proxy: S3Proxy,
    /// The server.
    server: S3Server,
    /// What the server keeps.
    directory: TempDir,
}

impl Scene {
    /// Starts both.
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let server = S3Server::start(directory.path());
        server.create_bucket(BUCKET);
        Self { proxy: S3Proxy::start(server.address()), server, directory }
    }

    /// A client of the server.
    fn direct(&self) -> AmazonS3 {
        client(&self.server.endpoint(), BUCKET).build().expect("a client")
    }

    /// A client of the proxy that makes so many more attempts at what fails.
    fn through_proxy(&self, retries: usize) -> AmazonS3 {
        let retry = RetryConfig { max_retries: retries, ..RetryConfig::default() };
        let options = ClientOptions::new().with_allow_http(true).with_timeout(TIMEOUT);
        let builder = client(&self.proxy.endpoint(), BUCKET).with_retry(retry).with_client_options(options);
        builder.build().expect("a client")
    }
}

/// So many bytes that do not repeat soon.
fn bytes(length: usize) -> Vec<u8> {
    (0..length as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

/// What a key holds.
async fn content(store: &AmazonS3, key: &str) -> Vec<u8> {
    store.get(&Path::from(key)).await.expect("an object").bytes().await.expect("its bytes").to_vec()
}

/// All keys below a prefix.
async fn keys(store: &AmazonS3, prefix: Option<&str>) -> Vec<String> {
    let prefix = prefix.map(Path::from);
    store.list(prefix.as_ref()).map_ok(|meta| meta.location.to_string()).try_collect().await.expect("a list")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_twenty_that_create_a_key_at_once_one_succeeds() {
    let scene = Scene::new();
    let store = Arc::new(scene.direct());
    for round in 0..10 {
        let key = Path::from(format!("locks/{round}"));
        let start = Arc::new(Barrier::new(20));
        let creators = (0..20).map(|creator: usize| {
            let (store, key, start) = (Arc::clone(&store), key.clone(), Arc::clone(&start));
            tokio::spawn(async move {
                start.wait().await;
                // Bodies of different length take differently long between the check and the publication.
                let body = vec![creator as u8; 1 + (creator % 4) * 50_000];
                (creator, store.put_opts(&key, body.into(), PutMode::Create.into()).await)
            })
        });
        let mut winners = Vec::new();
        for creator in creators.collect::<Vec<_>>() {
            match creator.await.expect("no panic") {
                (creator, Ok(_)) => winners.push(creator),
                (_, Err(Error::AlreadyExists { .. })) => {}
                (creator, Err(error)) => panic!("creator {creator}: {error}"),
            }
        }
        let found = content(&store, key.as_ref()).await;
        assert_eq!(winners, [usize::from(found[0])], "round {round}");
        assert_eq!(found.len(), 1 + (winners[0] % 4) * 50_000);
    }
}

#[tokio::test]
async fn a_put_on_a_condition_leaves_alone_what_another_one_put() {
    let scene = Scene::new();
    let store = scene.direct();
    let key = Path::from("state/current");
    let first = store.put_opts(&key, "one".into(), PutMode::Create.into()).await.expect("a new key");
    let again = store.put_opts(&key, "two".into(), PutMode::Create.into()).await;
    assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
    let update = |version| PutMode::Update(UpdateVersion::from(version)).into();
    store.put_opts(&key, "two".into(), update(first.clone())).await.expect("the version that is there");
    let stale = store.put_opts(&key, "three".into(), update(first)).await;
    assert!(matches!(stale, Err(Error::Precondition { .. })), "{stale:?}");
    assert_eq!(content(&store, "state/current").await, b"two");

    store.delete(&key).await.expect("a deletion");
    store.put_opts(&key, "four".into(), PutMode::Create.into()).await.expect("a key that is new again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_reader_sees_a_key_that_is_overwritten_either_old_or_new() {
    let scene = Scene::new();
    let (store, key) = (scene.direct(), Path::from("state/current"));
    let body = |n: usize| vec![n as u8; 10_000 + n * 1000];
    store.put(&key, body(0).into()).await.expect("an object");
    let writer = tokio::spawn({
        let (store, key) = (scene.direct(), key.clone());
        async move {
            for n in 0..250 {
                store.put(&key, body(n).into()).await.expect("an object");
            }
        }
    });
    while !writer.is_finished() {
        let found = content(&store, key.as_ref()).await;
        assert!(found == body(found[0].into()), "{} bytes, the first is {}", found.len(), found[0]);
    }
    writer.await.expect("no panic");
}

#[tokio::test]
async fn a_list_has_every_key_in_order_over_several_pages() {
    let scene = Scene::new();
    let store = scene.direct();
    let mut expected: Vec<_> = (0..2100).map(|i| format!("data/{:02x}/{i:05}", i % 7)).collect();
    // Where the order of bytes is not that of directories.
    expected.extend(["data/00-x", "data/00.x", "data/000", "date"].map(str::to_owned));
    let put = |key: &String| {
        let (store, key) = (&store, Path::from(key.as_str()));
        async move { store.put(&key, PutPayload::from_static(b"x")).await.map(drop) }
    };
    stream::iter(expected.iter().map(put)).buffer_unordered(16).try_collect::<()>().await.expect("objects");
    expected.sort();

    assert_eq!(keys(&scene.through_proxy(0), None).await, expected);
    let pages = scene.proxy.requests();
    assert!(pages.iter().all(|seen| seen.method == "GET" && seen.target.contains("list-type=2")), "{pages:?}");
    assert_eq!(pages.len(), 3);

    let below: Vec<_> = expected.iter().filter(|key| key.starts_with("data/03/")).cloned().collect();
    assert_eq!(keys(&store, Some("data/03")).await, below);
    let after = Path::from("data/05/01000");
    let rest = store.list_with_offset(Some(&Path::from("data")), &after).map_ok(|meta| meta.location.to_string());
    let rest: Vec<_> = rest.try_collect().await.expect("a list");
    let later = expected.iter().filter(|key| key.starts_with("data/") && key.as_str() > after.as_ref());
    assert_eq!(rest, later.cloned().collect::<Vec<_>>());
    let level = store.list_with_delimiter(Some(&Path::from("data"))).await.expect("a list");
    assert_eq!((level.common_prefixes.len(), level.objects.len()), (7, 3));

    let doomed = stream::iter(below.clone()).map(|key| Ok(Path::from(key))).boxed();
    let deleted: Vec<_> = store.delete_stream(doomed).try_collect().await.expect("deletions");
    assert_eq!(deleted.len(), below.len());
    assert_eq!(keys(&store, Some("data/03")).await, Vec::<String>::new());
}

#[tokio::test]
async fn objects_are_read_whole_and_in_part() {
    let scene = Scene::new();
    let store = scene.direct();
    let (key, whole) = (Path::from("packs/a b+c"), bytes(12 << 20));
    let mut upload = WriteMultipart::new(store.put_multipart(&key).await.expect("an upload"));
    upload.write(&whole);
    let put = upload.finish().await.expect("an object");
    let meta = store.head(&key).await.expect("an object");
    assert_eq!((meta.size, &meta.e_tag), (whole.len() as u64, &put.e_tag));
    assert!(meta.e_tag.is_some());
    assert!(content(&store, "packs/a b+c").await == whole);
    let part = store.get_range(&key, 5_000_000..5_000_100).await.expect("a range");
    assert_eq!(part, whole[5_000_000..5_000_100]);
    let suffix = GetOptions { range: Some(GetRange::Suffix(9)), ..GetOptions::default() };
    let suffix = store.get_opts(&key, suffix).await.expect("a suffix").bytes().await.expect("its bytes");
    assert_eq!(suffix, whole[whole.len() - 9..]);

    let mut aborted = store.put_multipart(&Path::from("packs/b")).await.expect("an upload");
    aborted.put_part(bytes(5 << 20).into()).await.expect("a part");
    aborted.abort().await.expect("an abort");
    let missing = store.head(&Path::from("packs/b")).await;
    assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
    store.delete(&Path::from("packs/b")).await.expect("S3 deletes what is not there");
    assert_eq!(keys(&store, None).await, ["packs/a b+c"]);
}

#[tokio::test]
async fn a_server_outlives_the_thread_that_started_it() {
    let scene = std::thread::spawn(Scene::new).join().expect("a scene");
    let store = scene.direct();
    store.put(&Path::from("a"), "x".into()).await.expect("an object");
    assert_eq!(content(&store, "a").await, b"x");
}

#[tokio::test]
async fn a_killed_server_has_what_it_acknowledged() {
    let mut scene = Scene::new();
    let store = scene.through_proxy(0);
    store.put(&Path::from("a"), "kept".into()).await.expect("an object");
    scene.server.kill();
    store.get(&Path::from("a")).await.expect_err("no server");
    scene.server.restart();
    assert_eq!(content(&store, "a").await, b"kept");
    assert_eq!(std::fs::read(scene.server.bucket(BUCKET).join("a")).expect("the object's file"), b"kept");
    assert!(scene.directory.path().join("s3.log").exists());
}

#[tokio::test]
async fn a_request_that_is_lost_has_no_effect_and_a_lost_reply_has() {
    let scene = Scene::new();
    let (store, direct) = (scene.through_proxy(0), scene.direct());
    let faults = [
        (Effect::Drop(Stage::Before), false),
        (Effect::Answer(Stage::Before, 503), false),
        (Effect::Drop(Stage::After), true),
        (Effect::Answer(Stage::After, 500), true),
    ];
    for (n, (effect, done)) in faults.into_iter().enumerate() {
        let key = Path::from(format!("key/{n}"));
        scene.proxy.inject(Fault::new(effect).method("PUT").target("/smoke/key/"));
        store.put_opts(&key, "x".into(), PutMode::Create.into()).await.expect_err("a fault");
        scene.proxy.clear();
        assert_eq!(direct.head(&key).await.is_ok(), done, "{effect:?}");
        let seen = scene.proxy.requests().pop().expect("a request");
        assert_eq!((seen.effect, seen.status), (Some(effect), done.then_some(200)), "{seen:?}");
        // The ambiguity that a creator has to resolve: its own object is in its way.
        let again = store.put_opts(&key, "x".into(), PutMode::Create.into()).await;
        assert_eq!(matches!(again, Err(Error::AlreadyExists { .. })), done, "{effect:?}: {again:?}");
    }
}

#[tokio::test]
async fn a_stall_lasts_until_it_is_cleared() {
    let scene = Scene::new();
    let (store, direct) = (scene.through_proxy(0), scene.direct());
    for (stage, key, done) in [(Stage::Before, "before", false), (Stage::After, "after", true)] {
        scene.proxy.inject(Fault::new(Effect::Stall(stage)));
        let key = Path::from(key);
        let put = store.put(&key, "x".into());
        let waited = tokio::time::timeout(Duration::from_millis(500), put).await;
        assert!(waited.is_err(), "{stage:?}: {waited:?}");
        assert_eq!(direct.head(&key).await.is_ok(), done, "{stage:?}");
        scene.proxy.clear();
        store.put(&key, "y".into()).await.expect("no fault");
    }
    scene.proxy.inject(Fault::new(Effect::Stall(Stage::Before)));
    let begun = Instant::now();
    let clear = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        scene.proxy.clear();
    };
    let key = Path::from("before");
    let (get, ()) = tokio::join!(store.get(&key), clear);
    get.expect_err("a connection that is closed");
    assert!(begun.elapsed() < TIMEOUT);
}

#[tokio::test]
async fn slow_networks_are_slow() {
    let scene = Scene::new();
    let store = scene.through_proxy(0);
    let (key, body) = (Path::from("slow"), bytes(400_000));
    let timed = async || {
        let begun = Instant::now();
        store.put(&key, body.clone().into()).await.expect("an object");
        let put = begun.elapsed();
        assert!(content(&store, "slow").await == body);
        (put, begun.elapsed().saturating_sub(put))
    };
    scene.proxy.inject(Fault::new(Effect::Throttle(800_000)));
    let (put, get) = timed().await;
    assert!(put >= Duration::from_millis(450) && get >= Duration::from_millis(450), "{put:?} {get:?}");
    scene.proxy.clear();
    scene.proxy.inject(Fault::new(Effect::Delay(Duration::from_millis(300))).method("GET"));
    let (_, get) = timed().await;
    assert!(get >= Duration::from_millis(300), "{get:?}");
}

#[tokio::test]
async fn bodies_that_are_cut_are_noticed() {
    let scene = Scene::new();
    let (store, direct) = (scene.through_proxy(0), scene.direct());
    let (key, body) = (Path::from("cut"), bytes(300_000));
    scene.proxy.inject(Fault::new(Effect::CutRequest(100_000)).method("PUT"));
    store.put(&key, body.clone().into()).await.expect_err("a cut request");
    assert!(matches!(direct.head(&key).await, Err(Error::NotFound { .. })), "a part of an object");
    scene.proxy.clear();

    store.put(&key, body.clone().into()).await.expect("an object");
    scene.proxy.inject(Fault::new(Effect::CutReply(100_000)).method("GET"));
    let reply = store.get(&key).await.expect("a head");
    assert_eq!(reply.meta.size, 300_000);
    let mut received = 0;
    let end = reply.into_stream().try_for_each(|chunk| {
        received += chunk.len();
        async { Ok(()) }
    });
    end.await.expect_err("a cut reply");
    assert!(received <= 100_000, "{received}");
}

#[tokio::test]
async fn faults_hit_the_requests_they_are_for() {
    let scene = Scene::new();
    let store = scene.through_proxy(0);
    let key = Path::from("a");
    let get = async || store.head(&key).await.is_ok();
    store.put(&key, "x".into()).await.expect("an object");
    scene.proxy.inject(Fault::new(Effect::Answer(Stage::Before, 429)).method("HEAD").skip(1).times(2));
    assert_eq!([get().await, get().await, get().await, get().await], [true, false, false, true]);
    scene.proxy.clear();

    let mut runs = Vec::new();
    for _ in 0..2 {
        scene.proxy.inject(Fault::new(Effect::Drop(Stage::Before)).target("/smoke/a").chance(0.3, 5));
        let mut run = Vec::new();
        for _ in 0..100 {
            run.push(get().await);
        }
        scene.proxy.clear();
        runs.push(run);
    }
    let failed = runs[0].iter().filter(|ok| !**ok).count();
    assert!((15..50).contains(&failed), "{failed} of 100");
    assert_eq!(runs[0], runs[1]);
    assert_eq!(scene.proxy.counts().into_iter().collect::<Vec<_>>(), [("HEAD".into(), 204), ("PUT".into(), 1)]);

    // As long as the client tries again, nothing of this is an error.
    scene.proxy.inject(Fault::new(Effect::Answer(Stage::Before, 503)).times(2));
    scene.through_proxy(3).head(&key).await.expect("the third attempt");
    assert_eq!(scene.proxy.requests().len(), 208);
}
