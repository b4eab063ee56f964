//! From an address to a storage.

use super::{RepositoryError, storage::Storage};
use object_store::{
    Certificate, ClientOptions, ObjectStore, RetryConfig, aws::AmazonS3Builder, azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder, local::LocalFileSystem, memory::InMemory, path::Path,
};
use std::{path::PathBuf, sync::Arc, time::Duration};
use url::Url;

/// One request, body included: a chunk of 8 MiB at 70 KB/s.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// A request is repeated for at most this long.
const RETRY_LIMIT: Duration = Duration::from_secs(180);

/// Where a repository is, and how to get there.
#[derive(Debug, Clone, Default)]
pub struct Location {
    /// A directory, or `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX`. Credentials and regions come
    /// from the environment, by the names that the providers' own tools use.
    pub url: String,
    /// S3: address of a server that is not Amazon's. Buckets are then in the path.
    pub s3_endpoint: Option<String>,
    /// S3: region.
    pub s3_region: Option<String>,
    /// PEM file with certificates to trust besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Make the directory when it is missing.
    pub create: bool,
}

impl Location {
    /// The storage at this place. Nothing is read or written yet.
    pub fn open(&self) -> Result<Storage, RepositoryError> {
        let bad = |why: String| RepositoryError::BadUrl { url: self.url.clone(), why };
        if !self.url.contains("://") {
            return self.directory(std::path::Path::new(&self.url));
        }
        let url = Url::parse(&self.url).map_err(|error| bad(error.to_string()))?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
            return Err(bad("credentials do not belong into an address; use the environment".into()));
        }
        match url.scheme() {
            "file" => self.directory(&url.to_file_path().map_err(|()| bad("it is no local path".into()))?),
            "memory" => self.remote(Arc::new(InMemory::new()), &url),
            "s3" => self.remote(Arc::new(self.s3(&url)?), &url),
            "gs" => {
                let builder = GoogleCloudStorageBuilder::from_env()
                    .with_client_options(self.client_options()?)
                    .with_retry(retries())
                    .with_url(url.as_str());
                self.remote(Arc::new(builder.build().map_err(|error| bad(error.to_string()))?), &url)
            }
            "az" => {
                let builder = MicrosoftAzureBuilder::from_env()
                    .with_client_options(self.client_options()?)
                    .with_retry(retries())
                    .with_url(url.as_str());
                self.remote(Arc::new(builder.build().map_err(|error| bad(error.to_string()))?), &url)
            }
            scheme => Err(bad(format!("`{scheme}` is unknown"))),
        }
    }

    fn directory(&self, path: &std::path::Path) -> Result<Storage, RepositoryError> {
        if self.create {
            use std::os::unix::fs::DirBuilderExt;
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.map_err(RepositoryError::local("create the directory of the repository"))?;
        }
        let path = path.canonicalize().map_err(|_| RepositoryError::Missing { url: self.url.clone() })?;
        let open = |durable| {
            let store = LocalFileSystem::new_with_prefix(&path)
                .map_err(|error| RepositoryError::BadUrl { url: self.url.clone(), why: error.to_string() })?;
            Ok::<_, RepositoryError>(Arc::new(store.with_fsync(durable)) as Arc<dyn ObjectStore>)
        };
        Ok(Storage::new(open(false)?, open(true)?, Path::default(), path.display().to_string(), Some(path)))
    }

    fn remote(&self, store: Arc<dyn ObjectStore>, url: &Url) -> Result<Storage, RepositoryError> {
        let prefix = Path::from_url_path(url.path())
            .map_err(|error| RepositoryError::BadUrl { url: self.url.clone(), why: error.to_string() })?;
        Ok(Storage::new(Arc::clone(&store), store, prefix, self.url.clone(), None))
    }

    fn s3(&self, url: &Url) -> Result<object_store::aws::AmazonS3, RepositoryError> {
        let bad = |why: String| RepositoryError::BadUrl { url: self.url.clone(), why };
        let bucket = url.host_str().ok_or_else(|| bad("it names no bucket".into()))?;
        let mut builder = AmazonS3Builder::from_env()
            .with_client_options(self.client_options()?)
            .with_retry(retries())
            .with_bucket_name(bucket);
        if let Some(endpoint) = &self.s3_endpoint {
            let insecure = endpoint.starts_with("http://");
            builder = builder.with_endpoint(endpoint).with_virtual_hosted_style_request(false);
            builder = builder.with_allow_http(insecure);
        }
        if let Some(region) = &self.s3_region {
            builder = builder.with_region(region);
        }
        builder.build().map_err(|error| bad(error.to_string()))
    }

    fn client_options(&self) -> Result<ClientOptions, RepositoryError> {
        let mut options = ClientOptions::new().with_timeout(REQUEST_LIMIT).with_connect_timeout(CONNECT_LIMIT);
        if let Some(path) = &self.ca_file {
            let pem = std::fs::read(path).map_err(RepositoryError::local("read the file with trusted certificates"))?;
            let certificates = Certificate::from_pem_bundle(&pem).map_err(|error| {
                RepositoryError::Invalid(format!("{} holds no certificates: {error}", path.display()))
            })?;
            for certificate in certificates {
                options = options.with_root_certificate(certificate);
            }
        }
        Ok(options)
    }
}

/// Only what may pass by itself is repeated: connections that break, 5xx, 429.
fn retries() -> RetryConfig {
    RetryConfig { retry_timeout: RETRY_LIMIT, ..RetryConfig::default() }
}
