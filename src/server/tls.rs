//! TLS (`--tls-certfile`, `--tls-keyfile`): rustls with ring, TLS 1.2 and 1.3.
//!
//! The files are read once, at start. Client certificates are not asked for; API keys say who may come in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls;

/// Certificate files that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file can't be read, or holds nothing of its kind.
    #[error("{what} in {path}: {source}")]
    File {
        /// What was looked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it is not there.
        source: pem::Error,
    },
    /// The certificate file holds no certificate.
    #[error("{path} holds no certificate (a PEM file with BEGIN CERTIFICATE is needed)")]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// Key and certificate don't fit, or are of an unknown kind.
    #[error("the TLS key and certificate can't be used: {0}")]
    Rustls(#[from] rustls::Error),
}

/// A server's certificate chain and key.
///
/// # Errors
/// [`TlsError`] says which file is at fault.
pub fn load(certificates: &Path, key: &Path) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let fault = |what, path: &Path| {
        let path = path.to_owned();
        move |source| TlsError::File { what, path, source }
    };
    let chain = CertificateDer::pem_file_iter(certificates)
        .map_err(fault("no certificate", certificates))?
        .collect::<Result<Vec<_>, _>>()
        .map_err(fault("no certificate", certificates))?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate { path: certificates.to_owned() });
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(fault("no private key", key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
