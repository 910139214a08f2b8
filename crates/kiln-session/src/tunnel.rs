//! The byte pipe of `Control.Session`: a stream of messages as an [`AsyncRead`] and [`AsyncWrite`], for either side.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use futures::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::PollSender;

/// The most bytes put into one outgoing message. Peers accept more; this is what they send themselves.
pub const MAX_CHUNK: usize = 32 * 1024;

/// Outgoing messages that may wait in memory; with [`MAX_CHUNK`] this bounds a tunnel at 256 KiB.
const WAITING: usize = 8;

/// One end of a session's byte pipe.
///
/// Message boundaries mean nothing; an empty message is not the end. Shutting it down, or dropping it, ends the stream
/// of outgoing messages.
#[derive(Debug)]
pub struct Tunnel<S> {
    inbound: S,
    current: Bytes,
    ended: bool,
    outbound: PollSender<Bytes>,
}

/// The messages a [`Tunnel`] wants to send, to be put on the wire by whoever owns the stream.
#[derive(Debug)]
pub struct Outbound(mpsc::Receiver<Bytes>);

/// The writing half of a [`Tunnel`] whose reading half does not exist yet.
#[derive(Debug)]
pub struct Writer(mpsc::Sender<Bytes>);

/// The outgoing direction alone, for the side that makes the call: its request needs the messages, and only the answer
/// brings the inbound stream.
pub fn outgoing() -> (Writer, Outbound) {
    let (sender, receiver) = mpsc::channel(WAITING);
    (Writer(sender), Outbound(receiver))
}

impl<S> Tunnel<S> {
    /// A tunnel that reads from `inbound`, and the messages it writes.
    pub fn new(inbound: S) -> (Self, Outbound) {
        let (writer, outbound) = outgoing();
        (Self::join(inbound, writer), outbound)
    }

    /// Puts both directions together.
    pub fn join(inbound: S, writer: Writer) -> Self {
        Tunnel {
            inbound,
            current: Bytes::new(),
            ended: false,
            outbound: PollSender::new(writer.0),
        }
    }
}

impl Stream for Outbound {
    type Item = Bytes;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        self.0.poll_recv(cx)
    }
}

impl<S> AsyncRead for Tunnel<S>
where
    S: Stream<Item = io::Result<Bytes>> + Unpin,
{
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if !self.current.is_empty() {
                let take = self.current.len().min(buf.remaining());
                let head = self.current.split_to(take);
                buf.put_slice(&head);
                return Poll::Ready(Ok(()));
            }
            if self.ended {
                return Poll::Ready(Ok(()));
            }
            // An empty message must not be returned as it is: zero bytes mean the end to a reader.
            match ready!(Pin::new(&mut self.inbound).poll_next(cx)) {
                Some(Ok(message)) => self.current = message,
                Some(Err(error)) => {
                    self.ended = true;
                    return Poll::Ready(Err(error));
                }
                None => self.ended = true,
            }
        }
    }
}

impl<S: Unpin> Tunnel<S> {
    fn poll_send(&mut self, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let closed = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        ready!(self.outbound.poll_reserve(cx)).map_err(closed)?;
        let mut message = BytesMut::with_capacity(total.min(MAX_CHUNK));
        for part in parts {
            let room = MAX_CHUNK - message.len();
            message.extend_from_slice(part.get(..room).unwrap_or(part));
        }
        let sent = message.remaining();
        self.outbound.send_item(message.freeze()).map_err(closed)?;
        Poll::Ready(Ok(sent))
    }
}

impl<S: Unpin> AsyncWrite for Tunnel<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_send(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.outbound.close();
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn empty_messages_are_not_the_end() {
        let messages = ["ab", "", "", "c"].map(|text| Ok(Bytes::from_static(text.as_bytes())));
        let (mut tunnel, _outbound) = Tunnel::new(futures::stream::iter(messages));
        let mut all = String::new();
        tunnel.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "abc");
    }

    #[tokio::test]
    async fn writes_are_split_and_end_on_shutdown() {
        let (mut tunnel, outbound) = Tunnel::new(futures::stream::empty::<io::Result<Bytes>>());
        let writer = async move {
            tunnel.write_all(&vec![7u8; 100_000]).await.unwrap();
            tunnel.shutdown().await.unwrap();
        };
        let ((), messages) = tokio::join!(writer, outbound.collect::<Vec<_>>());
        assert!(
            messages
                .iter()
                .all(|message| message.len() <= MAX_CHUNK && !message.is_empty())
        );
        assert_eq!(messages.iter().map(Bytes::len).sum::<usize>(), 100_000);
    }

    #[tokio::test]
    async fn a_dropped_receiver_is_a_broken_pipe() {
        let (mut tunnel, outbound) = Tunnel::new(futures::stream::empty::<io::Result<Bytes>>());
        drop(outbound);
        let error = tunnel.write_all(b"x").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn an_inbound_error_is_reported_once() {
        let messages = vec![
            Ok(Bytes::from_static(b"x")),
            Err(io::Error::from(io::ErrorKind::ConnectionReset)),
        ];
        let (mut tunnel, _outbound) = Tunnel::new(futures::stream::iter(messages));
        let mut buffer = [0u8; 8];
        assert_eq!(tunnel.read(&mut buffer).await.unwrap(), 1);
        assert_eq!(
            tunnel.read(&mut buffer).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionReset
        );
        assert_eq!(tunnel.read(&mut buffer).await.unwrap(), 0);
    }
}
