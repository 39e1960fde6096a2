#[allow(dead_code)]
async fn f<T: Op + 'static, U, const N: usize>(
    __a0: State<T>,
    __idem: ::idem_runtime::__private::Idem<
        Wrap<U>,
        ::idem_runtime::__private::EngineInRouterState,
    >,
) -> ::idem_runtime::__private::Guarded<Result<impl IntoResponse, E>>
where
    U: Clone,
    U: 'static,
{
    let __policy: &'static ::idem_runtime::__private::Policy = &const {
        ::idem_runtime::__private::Policy::new(T::ANCHOR)
            .scope(::idem_runtime::__private::Scope::global())
            .format(::idem_runtime::__private::Format::Hex(32))
            .fingerprint(
                ::idem_runtime::__private::FingerprintScheme::body_fields(&["a"]),
            )
    };
    {
        #[allow(unused_imports)]
        use ::idem_runtime::__private::transaction::Fallback as _;
        const {
            ::idem_runtime::__private::transaction::none(
                ::idem_runtime::__private::transaction::Of::<State<T>>::COUNT,
            )
        };
        const {
            ::idem_runtime::__private::transaction::none(
                ::idem_runtime::__private::transaction::Of::<Wrap<U>>::COUNT,
            )
        };
    }
    ::idem_runtime::__private::run(
            __idem,
            __policy,
            move |__last: Wrap<U>| ::idem_runtime::__private::boxed(async move {
                let __args = (__a0, __last);
                let State(s) = __args.0;
                let b = __args.1;
                #[allow(unused_braces)] { x }
            }),
        )
        .await
}
